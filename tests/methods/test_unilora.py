"""Uni-LoRA: all factors are one vector dealt out, against the projection as a matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.banked import Assigned
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

SIZES = ((12, 8), (8, 6))                        # in, out


def made(settings="rank=2, dimension=15", sizes=SIZES):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*s) for s in sizes)).double()
    tuned = burnish.tune(model, f"unilora({settings})", head=False, targets="*")
    terms = [t for _, t in tuned.terms(Assigned)]
    terms[0].shared.double()
    return model, tuned, terms


def projection(terms, rank, sizes):
    """P (D, d), with the table read off the terms."""
    at = torch.cat([t.at()[k].flatten() for t in terms for k in (0, 1)]).long()
    n = rank * sum(sum(s) for s in sizes)
    assert at.numel() == n
    P = torch.zeros(n, int(at.max()) + 1, dtype=torch.float64)
    P[torch.arange(n), at] = 1
    return P / P.sum(0).sqrt()


def test_outputs_and_gradients_are_those_of_the_projection():
    model, tuned, terms = made("rank=2, dimension=15, start=1.0")
    P = projection(terms, 2, SIZES)
    fixed = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model]

    def equation(x, theta):
        flat = P @ theta
        for (W, bias), (i, o) in zip(fixed, SIZES, strict=True):
            A, B, flat = flat[: 2 * i].view(2, i), flat[2 * i : 2 * (i + o)].view(o, 2), \
                flat[2 * (i + o) :]
            x = F.linear(x, W + B @ A, bias)
        return x

    follows(tuned, equation, [terms[0].shared.theta], (5, 3, 12))


@pytest.mark.parametrize("dimension", [1, 15, 16, 68])
def test_the_projection_keeps_lengths_and_deals_evenly(dimension):
    _, _, terms = made(f"rank=2, dimension={dimension}")
    P = projection(terms, 2, SIZES)
    assert P.shape == (68, dimension)
    torch.testing.assert_close(P.t() @ P, torch.eye(dimension, dtype=torch.float64))
    often = (P > 0).sum(0)
    assert set(often.tolist()) <= {68 // dimension, 68 // dimension + (68 % dimension > 0)}
    assert bool(((P > 0).sum(1) == 1).all())
    assert terms[0].shared.often.tolist() == often.tolist()


def test_the_order_is_that_of_numpys_generator():
    """So is what PEFT deals: every number as often, the rest drawn, all shuffled."""
    _, _, terms = made("rank=2, dimension=15, seed=7")
    rng = np.random.default_rng(7)
    each = np.concatenate([np.repeat(np.arange(15), 4), rng.choice(15, size=8, replace=False)])
    rng.shuffle(each)
    assert terms[0].shared.index.tolist() == each.tolist()
    assert terms[1].at()[0].flatten().tolist() == each[40:56].tolist()
    assert terms[1].at()[1].flatten().tolist() == each[56:].tolist()
    _, _, others = made("rank=2, dimension=15, seed=8")
    assert others[0].shared.index.tolist() != each.tolist()
    _, _, even = made("rank=2, dimension=17, seed=7")
    each = np.repeat(np.arange(17), 4)
    np.random.default_rng(7).shuffle(each)
    assert even[0].shared.index.tolist() == each.tolist()


def test_one_vector_trains_and_a_file_holds_no_more(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "unilora(rank=2, dimension=30)")
    for _ in range(2):
        tuned.step(batch)
    assert [p.numel() for p in tuned.parameters()] == [30]
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a/adapter_model.safetensors")
    assert [t.numel() for t in file.values()] == [30]
    torch.manual_seed(9)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_the_start_and_decay():
    _, tuned, terms = made("rank=4, dimension=1000", ((400, 400),))
    theta = terms[0].shared.theta.detach()
    assert 0.0195 < float(theta.max()) <= 0.02 and -0.02 <= float(theta.min()) < -0.0195
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_defaults_counts_and_cost():
    (method,) = burnish.parse("unilora")
    assert method.settings() == {"targets": None, "rank": 4, "dimension": 256, "dropout": 0.0,
                                 "start": 0.02, "seed": 42}
    place = Place("a", "weight", "linear", 9, 7)
    assert method.count(place) == 0 and method.per_token(place) == 4
    assert keeps_what_it_says("unilora", "vit") is None


@pytest.mark.parametrize("settings, words", [
    ("rank=0", "rank and dimension of at least 1"), ("dimension=0", "rank and dimension of at"),
    ("seed=-1", "seed of at least 0"), ("start=0.0", "start=0.0: at 0 no factor would ever move"),
    ("dropout=1.0", "probability"),
    ("dimension=65", "dimension=65 is more than the 64 entries of all factors")])
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(RecipeError, match=f"^unilora: .*{words}"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), f"unilora({settings})", head=False,
                     targets="0")


def test_what_just_can_be():
    for settings in ("dimension=64", "dimension=1", "rank=1", "rank=8, seed=0"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), f"unilora(dimension=9, {settings})"
                     if "dim" not in settings else f"unilora({settings})", head=False, targets="0")
    with pytest.raises(RankError, match="^unilora: rank 9"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "unilora(rank=9, dimension=3)", head=False,
                     targets="0")
