"""Bi-LoRA: the equation in float64, its merge, one bit an entry in the file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.bits import BitPair
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.models import tiny

V = {1: (0.6744897501960817,), 2: (0.37775416114944965, 1.2657203250220042)}


def answers(W, bits):
    """sigma (w + sg[q - w]) + m, q the nearest of the levels +-v."""
    m, sigma = W.mean(), W.std()
    w = (W - m) / (sigma + 1e-5)
    v = torch.tensor(sorted([*V[bits], *(-x for x in V[bits])]), dtype=W.dtype)
    q = v[(w.detach()[..., None] - v).abs().argmin(-1)]
    return sigma * (w + (q - w).detach()) + m


@pytest.mark.parametrize("bits", [1, 2])
def test_outputs_gradients_and_the_merge_are_those_of_the_equation(bits):
    """y = x W^T + b + s x Q(A)^T Q(B)^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    tuned = burnish.tune(model, f"bi_lora(rank=3, scale=0.7, bits={bits})", head=False, targets="0")
    (_, term), = tuned.terms(BitPair)
    term.double()
    stir(tuned, size=0.5)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()

    def equation(x, A, B):
        return x @ W.T + b + 0.7 * x @ answers(A, bits).T @ answers(B, bits).T

    follows(tuned, equation, [term.A.weight, term.B.weight], (5, 3, 12), rtol=1e-7, atol=1e-8)


def test_each_factor_has_two_values_and_the_update_their_rank():
    term = BitPair(Place("x", "weight", "linear", 24, 40), 4, 1, 2.0)
    A, B = (t.detach() for t in term.pair())
    assert A.unique().numel() == B.unique().numel() == 2
    torch.testing.assert_close(term.dense().detach(), B @ A)
    assert torch.linalg.matrix_rank(term.dense().detach()) <= 4


def test_the_file_holds_one_bit_an_entry_and_answers_the_same(tmp_path):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bi_lora(rank=8)", head=False, targets="q,v")
    stir(tuned)
    want = net.eval()(**batch).logits
    tuned.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == 4 * 2 * (32 * 8 // 8 + 8)
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert not list(again.parameters())
    assert torch.equal(again.model.eval()(**batch).logits, want)
    torch.testing.assert_close(again.merge()(**batch).logits, want, rtol=1e-5, atol=1e-6)
    tuned.save(tmp_path / "whole", whole=True)
    on = burnish.load(tiny("vit")[0], tmp_path / "whole")
    assert len(list(on.parameters())) == 8
    assert torch.equal(on.model.eval()(**batch).logits, want)


def test_gradients_are_estimates_of_a_function_that_is_flat_between_its_levels():
    """What a step far below a level moves is the mean and the deviation alone; the gradient says
    that every entry moves what answers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    tuned = burnish.tune(model, "bi_lora(rank=3)", head=False, targets="0")
    (_, term), = tuned.terms(BitPair)
    term.double()
    stir(tuned, size=0.5)
    x, p, step = torch.randn(5, 12).double(), term.A.weight, 1e-7
    g, = torch.autograd.grad(model(x).square().sum(), p)
    d, centred = torch.randn(p.shape).double(), p.detach() - p.detach().mean()
    d -= d.mean() + centred * (d * centred).sum() / centred.square().sum()
    with torch.no_grad():                                  # mean and deviation stay to first order
        before = model(x).square().sum()
        p.add_(step * d)
        moved = float(model(x).square().sum() - before) / step
    assert abs(moved) < 1e-3 * abs(float((g * d).sum()))
    assert not parse("bi_lora")[0].exact


def test_counts_defaults_and_refusals():
    m = parse("bi_lora")[0]
    assert (m.rank, m.bits, m.scale, m.stored) == (32, 1, 1.0, False)
    place = Place("x", "weight", "linear", 24, 40)
    assert m.count(place) == 32 * 64 and parse("bi_lora(stored=True)")[0].count(place) == 0
    with pytest.raises(burnish.RecipeError, match="stored=True. has the codes of a saved adapter"):
        burnish.tune(tiny("vit")[0], "bi_lora(rank=4, stored=True)")
    with pytest.raises(burnish.core.errors.RankError):
        burnish.tune(tiny("vit")[0], "bi_lora(rank=400)")
