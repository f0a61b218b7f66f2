"""TWN: weights of three values on rounded inputs, written out with plain torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight.ternary import Ternary
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing.models import tiny

F64 = torch.float64


class Through(torch.autograd.Function):
    """Some values, and the gradient of what they are of where that is inside (-edge, edge)."""

    @staticmethod
    def forward(ctx, x, values, edge):
        ctx.save_for_backward(x)
        ctx.edge = edge
        return values

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < ctx.edge), None, None


def three(W, edge=2.5, share="row"):
    V = W.detach().clamp(-edge, edge)
    rows = V.reshape(1, -1) if share == "matrix" else V
    out = torch.empty_like(rows)
    for i, row in enumerate(rows):
        t = 0.7 * row.abs().mean()
        large = row.abs() > t
        a = row.abs()[large].mean() if large.any() else 0.0
        out[i] = torch.where(row > t, a, torch.where(row < -t, -a, 0.0))
    return Through.apply(W, out.view_as(W), edge)


def rounded(x, bits=8, edge=2.5):
    y = x.detach().clamp(-edge, edge)
    s = y.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return Through.apply(x, torch.where(s > 0, (y / s.clamp_min(1e-300)).round() * s, y), edge)


@pytest.mark.parametrize("share", ["row", "matrix"])
@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
@pytest.mark.parametrize("bits, edge", [(8, 2.5), (4, 0.8)])
def test_outputs_and_gradients_are_those_of_the_equation(share, kind, recipe, bits, edge):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 7) if kind == "linear" else Conv1D(7, 12)).double()
    nn.init.normal_(net[0].weight)
    tuned = burnish.tune(net, f"{recipe} + twn(share='{share}', input_bits={bits}, edge={edge})",
                         targets="0", head=False)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.1 * torch.randn_like(p.data, dtype=F64)
    own = [p.detach().clone().requires_grad_() for p in tuned.parameters()]
    if recipe == "full":
        W, = [q for q, p in zip(own, tuned.parameters(), strict=True) if p is net[0].weight]
        W = W if kind == "linear" else W.t()
    else:
        (term,) = [t for _, t in tuned.terms(nn.Module) if hasattr(t, "A")]
        W = net[0].weight.detach()
        W = (W if kind == "linear" else W.t()) + term.scale * own[1] @ own[0]
    x = torch.randn(3, 4, 12, dtype=F64)
    x[0, 0] = 0.0
    y = x.clone().requires_grad_()
    x.requires_grad_()
    got = net(x)
    want = F.linear(rounded(y, bits, edge), three(W, edge, share), net[0].bias.detach())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    assert edge > 1 or 0 < int((x.grad == 0).sum()) < x.numel()
    for p, ref in zip(tuned.parameters(), own, strict=True):
        if ref.grad is not None:
            torch.testing.assert_close(p.grad, ref.grad, rtol=1e-8, atol=1e-8)


def test_a_weight_has_three_values_and_half_of_normal_ones_are_zero():
    torch.manual_seed(0)
    W = torch.randn(40, 500)
    V, inside = Ternary(8, 2.5, -1).rounded(W, W)
    assert all(len(set(row.tolist())) == 3 for row in V)
    assert torch.equal(inside, W.abs() < 2.5)
    assert float((V == 0).float().mean()) == pytest.approx(0.42, abs=0.02)  # P(|w| < 0.7 E|w|)
    V, _ = Ternary(8, 2.5, None).rounded(W, W)
    assert len(set(V.flatten().tolist())) == 3
    W = torch.tensor([[0.0, -2.0, 0.1, 0.0]])                  # one of them alone is large
    assert Ternary(8, 2.5, -1).rounded(W, W)[0].tolist() == [[0.0, -2.0, 0.0, 0.0]]
    V, _ = Ternary(8, 2.5, -1).rounded(torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(V, torch.zeros(2, 3))


def test_a_table_has_a_threshold_per_token():
    net = nn.Sequential(nn.Embedding(11, 6)).double()
    W = net[0].weight.detach().clone()
    burnish.tune(net, "full + twn(targets='0')", head=False)
    got = net(torch.arange(11))
    torch.testing.assert_close(got.detach(), three(W), rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_backward_keeps_a_byte_and_a_bit_of_what_is_read():
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    burnish.tune(net, "full + twn", targets="0", head=False)
    x = torch.randn(10, 64)
    with Ledger(net) as ledger:
        ledger.watch("weights", [x])
        y = net(x)
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert alive - y.nbytes == 10 * 64 + 10 * 4 + 10 * 64 // 8


def test_latent_weights_train_and_do_not_merge():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "full + twn", head=False)
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(10)]
    assert losses[-1] < losses[0]
    with pytest.raises(CheckError, match="merge"):
        tuned.merge()
    head = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    tuned = burnish.tune(head, "lora(rank=2) + twn", targets="all", head=False)
    assert [n for n, _ in tuned.terms(Ternary)] == ["body.weight"]


@pytest.mark.parametrize("text", ["input_bits=1", "input_bits=9", "edge=0.0", "share='head'"])
def test_settings_are_checked(text):
    with pytest.raises(RecipeError, match="expected"):
        parse(f"twn({text})")


def test_the_defaults():
    assert parse("twn")[0].settings() == {"targets": None, "share": "row", "input_bits": 8,
                                          "edge": 2.5}


def test_one_function_of_a_weight_and_others_elsewhere():
    net, _ = tiny("bert")
    for text in ("full + twn + bibert(attention=False)", "lora(rank=2) + bibert(attention=False) "
                 "+ twn"):
        with pytest.raises(RecipeError, match="function"):
            burnish.tune(net, text, head=False)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tuned = burnish.tune(net, "full + twn(targets='0') + twn(targets='1', share='matrix')",
                         targets="0,1", head=False)
    assert [t.dims for _, t in tuned.terms(Ternary)] == [1, None]
