"""FourierFT: a few coefficients of a transform, against cosines written out and torch's ifft2."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.cosines import Cosines
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(inp, out, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, f"fourierft({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Cosines)
    term.double()
    return model, W, bias, tuned, term


@pytest.mark.parametrize("inp, out", [(12, 10), (7, 15)])
def test_outputs_and_gradients_are_those_of_the_cosines(inp, out):
    model, W, bias, tuned, term = made(inp, out, "n=9, alpha=20.0")
    u, v = term.index // inp, term.index % inp
    o, i = torch.arange(out).double(), torch.arange(inp).double()
    waves = torch.cos(2 * math.pi * (u[:, None, None] * o[:, None] / out + v[:, None, None] * i /
                                     inp))
    follows(tuned, lambda x, c: F.linear(
        x, W + 20.0 / (out * inp) * torch.einsum("k,koi->oi", c, waves), bias), [term.c],
        (5, 3, inp))


def test_it_is_the_real_part_of_the_inverse_transform():
    _, _, _, _, term = made(24, 18, "n=30, alpha=3.0")
    spectrum = torch.zeros(18 * 24, dtype=torch.float64)
    spectrum[term.index] = term.c.detach()
    want = 3.0 * torch.fft.ifft2(spectrum.view(18, 24).to(torch.complex128)).real
    torch.testing.assert_close(term.dense(), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(term.tile(5, 11, None), want[:, 5:11], rtol=1e-9, atol=1e-12)


def test_positions_are_distinct_and_those_of_the_shape():
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    tuned = burnish.tune(net, "fourierft(n=50)", head=False, targets="*")
    first, *equal = (t for _, t in tuned.terms(Cosines))
    assert len(set(first.index.tolist())) == 50 and int(first.index.max()) < 16 * 12
    assert torch.equal(equal[0].index, equal[1].index)
    other = burnish.tune(nn.Sequential(nn.Linear(16, 12)), "fourierft(n=50, seed=3)", head=False,
                         targets="0")
    assert not torch.equal(first.index, next(t for _, t in other.terms(Cosines)).index)


def test_positions_of_torch_are_those_of_its_permutation():
    """As PEFT draws them, for each shape anew from the seed."""
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 5))
    tuned = burnish.tune(net, "fourierft(n=50, seed=3, positions='torch')", head=False, targets="*")
    for (_, term), entries in zip(tuned.terms(Cosines), (192, 60), strict=True):
        want = torch.randperm(entries, generator=torch.Generator().manual_seed(3))[:50]
        assert torch.equal(term.index, want)


def test_large_positions_lose_nothing_in_single_precision():
    """v i reaches 10^7 full turns of a wide matrix; whole turns are taken off as integers."""
    torch.manual_seed(0)
    index = torch.tensor([3 * 5000 + 4999, 7 * 5000 + 2501])
    term = Cosines(8, 5000, index, 8.0 * 5000, 1.0)
    v, u = torch.tensor([4999, 2501]), torch.tensor([3, 7])
    i, o = torch.arange(5000), torch.arange(8)
    turn = (u[:, None, None] * o[:, None]).double() / 8 + ((v[:, None, None] * i) % 5000) / 5000
    want = torch.einsum("k,koi->oi", term.c.double(), torch.cos(2 * math.pi * turn))
    torch.testing.assert_close(term.dense().double(), want, rtol=0, atol=1e-5)


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "fourierft(n=40, zero=True)")
    assert torch.equal(net(**batch).logits, want)
    _, _, _, tuned, term = made(100, 100, "n=4000")
    assert float(term.c.detach().std()) == pytest.approx(1, rel=0.1)
    assert type(tuned.recipe[0]).identity is False
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_the_count_on_roberta_base():
    (method,) = burnish.parse("fourierft")
    net = tiny("roberta", meta=True, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
               num_attention_heads=12)[0]
    assert sum(method.count(p) for p in match(Anatomy.of(net), "q,v")) == 24_000


@pytest.mark.parametrize("positions", ["portable", "torch"])
def test_a_file_of_coefficients_alone_finds_its_positions(positions, tmp_path):
    from safetensors.torch import load_file

    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"fourierft(n=20, positions={positions!r})")
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"c"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(RankError, match="n=13 coefficients, 0.weight has 12"):
        burnish.tune(nn.Sequential(nn.Linear(4, 3)), "fourierft(n=13)", head=False, targets="0")
    burnish.tune(nn.Sequential(nn.Linear(4, 3)), "fourierft(n=12)", head=False, targets="0")
    with pytest.raises(burnish.RecipeError, match="^fourierft: n=0"):
        burnish.parse("fourierft(n=0)")


def test_defaults_are_the_published_ones():
    assert burnish.parse("fourierft")[0].settings() == {
        "targets": None, "n": 1000, "alpha": 150.0, "zero": False, "seed": 777,
        "positions": "portable"}


def test_bounds_and_cost():
    assert keeps_what_it_says("fourierft", "vit") is None
    assert burnish.parse("fourierft")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert burnish.parse("fourierft(n=1)")
