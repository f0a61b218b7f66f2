"""Draws of one's own: the numbers of a global seed, with nothing global touched."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import burnish
from burnish.core.draw import drawn
from burnish.testing.models import tiny


def draws():
    like = torch.empty(3, 4)
    m = nn.Linear(5, 7)
    conv = nn.Conv2d(2, 3, 3)
    return [torch.rand(3), torch.randn(2, 2), torch.randint(9, (4,)), torch.randperm(6),
            torch.normal(0.0, 1.0, (3,)), torch.normal(like.zero_(), 1.0), torch.rand_like(like),
            torch.randn_like(like), torch.empty(4).uniform_(-1, 1), torch.empty(4).normal_(),
            torch.bernoulli(torch.full((6,), 0.5)), torch.empty(5).bernoulli_(0.3),
            torch.empty(3).exponential_(), torch.multinomial(torch.ones(5), 3),
            nn.init.trunc_normal_(torch.empty(5)), nn.init.xavier_uniform_(torch.empty(3, 4)),
            nn.init.kaiming_uniform_(torch.empty(3, 4), a=1),
            nn.init.orthogonal_(torch.empty(3, 3)),
            nn.init.kaiming_normal_(torch.empty(3, 4)), nn.init.normal_(torch.empty(3)),
            m.weight, m.bias, conv.weight, nn.Embedding(4, 3).weight,
            nn.MultiheadAttention(4, 2).in_proj_weight]


def test_the_numbers_are_those_of_a_global_seed():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        want = draws()
    before = torch.get_rng_state()
    with drawn(11):
        got = draws()
    assert torch.equal(torch.get_rng_state(), before), "nothing global was drawn or set"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), k


def test_tensors_without_values_draw_nothing():
    with drawn(0):
        with torch.device("meta"):
            made = nn.Linear(3, 4)
        first = torch.rand(2)
    with drawn(0):
        assert torch.equal(torch.rand(2), first) and made.weight.is_meta


# findings 1.9
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "snella(rank=2)", "houlsby(width=4)",
                                    "prefix(length=2)", "vpt(length=2)", "lst(reduction=4)",
                                    "pissa(rank=2)", "shira(rank=2)", "mola(rank=2)"])
def test_two_tunes_at_once_with_equal_seeds_are_equal(recipe):
    models = [tiny("llama" if "lst" in recipe else "vit")[0] for _ in range(2)]
    start, made, failed = threading.Barrier(3), {}, []

    def tune(k):
        start.wait()
        try:
            made[k] = burnish.tune(models[k], recipe, seed=5)
        except BaseException as e:
            failed.append(e)

    def disturb():
        start.wait()
        while len(made) + len(failed) < 2:
            torch.rand(7)

    threads = [threading.Thread(target=tune, args=(k,)) for k in range(2)]
    threads.append(threading.Thread(target=disturb))
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed
    first, second = (dict(made[k].model.named_parameters()) for k in range(2))
    assert first.keys() == second.keys()
    for n in first:
        assert torch.equal(first[n], second[n]), n


def test_tune_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    burnish.tune(tiny("bert")[0], "lora(rank=2)", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
