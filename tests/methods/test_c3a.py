"""C3A: circulant blocks, against the matrices written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.circulant import Circulant
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def circulant(w):
    """First row w, each next one turned by one to the right."""
    return torch.stack([torch.roll(w, k) for k in range(len(w))])


def update(w):
    return torch.cat([torch.cat([circulant(v) for v in row], 1) for row in w]) \
        / (w.shape[1] * w.shape[2])


def made(settings="block=4", inp=8, out=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"c3a({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Circulant)
    term.double()
    return model, tuned, term


@pytest.mark.parametrize("inp, out, block", [(8, 12, 4), (15, 10, 5), (6, 6, 6), (4, 3, 1)])
def test_outputs_and_gradients_are_those_of_the_blocks(inp, out, block):
    model, tuned, term = made(f"block={block}", inp, out)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.w.normal_(std=inp)
    follows(tuned, lambda x, w: F.linear(x, W + update(w), b), [term.w], (5, 3, inp))


def test_a_convolution_has_blocks_over_its_whole_kernel():
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    W, bias = conv[0].weight.detach().clone(), conv[0].bias.detach()
    tuned = burnish.tune(conv, "c3a(block=6, init='normal')", head=False, targets="0")
    (_, term), = tuned.terms(Circulant)
    term.double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    want = F.conv2d(x, W + update(term.w).view_as(W), bias, padding=1)
    got = conv(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, term.w, g)[0] for y in (got, want)),
                               rtol=1e-8, atol=1e-10)


def test_half_precision_runs_and_is_near():
    term = Circulant(torch.randn(2, 3, 8), 0.5)
    x = torch.randn(5, 24).bfloat16()
    y = term.path(x)
    assert y.dtype == torch.bfloat16
    want = x.double() @ (update(term.w.double()) * 12).t()
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2)


def test_the_input_has_its_gradient_where_no_kernel_trains():
    model, _, term = made("block=4, init='normal'", 8, 12)
    term.w.requires_grad_(False)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (d,) = torch.autograd.grad(model(x).sum(), x)
    want = (model[0].weight + update(term.w)).sum(0)
    torch.testing.assert_close(d, want.expand(3, -1), rtol=1e-10, atol=1e-12)


def test_one_vector_is_a_block_of_full_rank():
    _, _, term = made("block=16, init='normal'", 16, 16)
    assert term.w.numel() == 16 and int(torch.linalg.matrix_rank(term.dense())) == 16


@pytest.mark.parametrize("init, bound, std", [
    ("xavier", (6 / 800)**0.5, None), ("kaiming", 0.05, None), ("normal", None, 1.0)])
def test_starts(init, bound, std):
    _, _, term = made(f"block=8, init={init!r}", 400, 400)
    w = term.w.detach()
    if bound is not None:
        assert float(w.abs().max()) == pytest.approx(bound, rel=1e-3)
        assert float(w.abs().max()) <= bound
        std = bound / 3**0.5
    assert float(w.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(w.mean())) < 0.05 * std


def test_xaviers_bound_is_of_both_sides():
    _, _, term = made("block=8", 800, 96)
    assert float(term.w.detach().abs().max()) == pytest.approx((6 / 896)**0.5, rel=1e-3)
    _, _, term = made("block=8, init='kaiming'", 800, 96)
    assert float(term.w.detach().abs().max()) == pytest.approx(800**-0.5, rel=1e-3)


def test_a_start_of_zeros_is_the_base():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "c3a(block=8, init='zero')")
    assert torch.equal(net(**batch).logits, want)


def test_counts_cost_and_decay():
    (method,) = burnish.parse("c3a")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 65_536
    assert 24 * burnish.parse("c3a(block=768)")[0].count(
        Place("a", "weight", "linear", 768, 768)) == 18_432             # RoBERTa-base q, v: 0.018 M
    assert method.settings() == {"targets": None, "block": 256, "init": "xavier"}
    assert keeps_what_it_says("c3a", "vit") is None
    assert method.per_token(Place("a", "weight", "linear", 9, 7)) == 0
    _, tuned, term = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
    assert term.w.numel() == burnish.parse("c3a(block=4)")[0].count(
        Place("0", "weight", "linear", 12, 8))


@pytest.mark.parametrize("recipe, shape, words", [
    ("c3a(block=0)", (8, 12), "block=0: expected at least 1"),
    ("c3a(block=8)", (8, 12), r"block=8 does not divide 0.weight \(12 x 8\); 2, 4 would"),
    ("c3a(block=8)", (12, 8), r"block=8 does not divide 0.weight \(8 x 12\); 2, 4 would"),
    ("c3a(block=5)", (7, 9), "none would"),
    ("c3a(block=5)", (768, 256), "; 2, 4, 8, 16, 32, 64, 128, 256 would")])
def test_what_cannot_be_is_refused(recipe, shape, words):
    with pytest.raises(RecipeError, match=f"^c3a: .*{words}"):
        burnish.tune(nn.Sequential(nn.Linear(*shape)), recipe, head=False, targets="0")
