"""Dropout acts wherever it is accepted, under the mask of a reference; else it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.testing import stir
from burnish.testing.models import tiny

P = 0.5


def stirred(model, recipe, **kw):
    tuned = burnish.tune(model, recipe, head=False, **kw)
    for _, x in tuned.terms(nn.Module):
        x.double()
    return stir(tuned, size=0.3)


def compare(got, want, wanted, rtol=1e-8):
    g = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


def mask(x, seed=7):
    """x under the mask that the generator gives next."""
    torch.manual_seed(seed)
    out = F.dropout(x, P, True)
    torch.manual_seed(seed)
    return out


@pytest.mark.parametrize("lean", ["", " + lean(on=False)"])
@pytest.mark.parametrize("conv, x", [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2, bias=False), (2, 4, 7, 7)),
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9)),
    (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
], ids=["plain", "grouped", "circular", "3d"])
def test_lora_drops_the_input_of_a_convolution(conv, x, lean):           # findings 3.5
    """y = conv(x, W) + s conv(drop(x), B A), under one mask."""
    conv = copy.deepcopy(conv).double()
    base = copy.deepcopy(conv)
    tuned = stirred(nn.Sequential(conv), f"lora(rank=3, dropout={P}){lean}", targets="0")
    (_, term), = tuned.terms(Chain)
    x = torch.randn(x, dtype=torch.float64, requires_grad=True)
    xd = mask(x)
    got = tuned.model(x)
    W = (term.scale * term.B @ term.A).view_as(base.weight)
    want = base(x) + base._conv_forward(xd, W, None)
    compare(got, want, [x, term.A, term.B])
    tuned.model.eval()
    torch.testing.assert_close(tuned.model(x), base._conv_forward(x, base.weight + W, base.bias))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_length_learns_from_what_was_dropped(kind):                    # findings 3.4
    """y = gain (W x + s B A drop(x)) + b, gain = m / ||W + s B A|| with the norm a constant."""
    model = nn.Sequential(nn.Linear(16, 24)).double()
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D
        model = nn.Sequential(Conv1D(24, 16)).double()
    tuned = stirred(model, f"dora(rank=4, dropout={P})", targets="0")
    (_, term), = tuned.terms(Chain)
    (_, length), = tuned.terms(Magnitude)
    W = model[0].weight.detach() if kind == "linear" else model[0].weight.detach().t()
    x = torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    xd = mask(x)
    got = model(x)
    c = (W + term.scale * term.B @ term.A).norm(dim=1).detach()
    want = (x @ W.t() + term.scale * (xd @ term.A.t() @ term.B.t())) * (length.m / c) \
        + model[0].bias
    compare(got, want, [x, term.A, term.B, length.m])


@pytest.mark.parametrize("recipe, model, targets", [
    ("lora(dropout=0.1)", "mha", "attn"), ("lora(dropout=0.1)", "gpt2", "wpe"),
    ("dora(dropout=0.1)", "mha", "q"), ("dora(dropout=0.1)", "cnn", None),
    ("lora(dropout=0.1)", "mixtral", "experts"), ("lora(rank=4, dropout=0.1)", "mamba", "x_proj"),
])
def test_dropout_that_cannot_act_is_refused(recipe, model, targets):     # findings 3.5
    recipe = recipe if "rank" in recipe else recipe.replace("(", "(rank=4, ")
    with pytest.raises(burnish.RecipeError, match="dropout cannot act"):
        burnish.tune(tiny(model)[0], recipe, targets=targets)


def test_by_default_weights_that_dropout_cannot_reach_are_named():
    tuned = burnish.tune(tiny("encoder")[0], "lora(rank=4, dropout=0.5)")
    assert any("dropout does not act on 4 of 8 weights" in n for n in tuned.summary()["notes"])


@pytest.mark.parametrize("recipe", [
    "lora(rank=4, dropout=0.5)", "dora(rank=4, dropout=0.5)", "mola(rank=4, dropout=0.5)",
    "parallel(bottleneck=4, dropout=0.5)", "vpt(length=3, dropout=0.5)"])
def test_dropout_acts_in_training_and_rests_in_evaluation(recipe):       # findings 3.5
    net, batch = tiny("vit")
    tuned = burnish.tune(net, recipe)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    a, b = (net(**batch).logits.detach() for _ in range(2))
    assert not torch.equal(a, b)
    net.eval()
    c, d = (net(**batch).logits.detach() for _ in range(2))
    assert torch.equal(c, d)


def test_the_tokens_of_vpt_are_dropped_sample_by_sample():               # findings 3.8
    """Two equal pictures in one batch see different masks."""
    net, batch = tiny("vit")
    burnish.tune(net, "vpt(length=8, dropout=0.5)")
    pixels = batch["pixel_values"][:1].repeat(2, 1, 1, 1)
    out = net(pixel_values=pixels).logits.detach()
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("factor", [1.002, 0.998])
def test_a_gain_near_one_counts_in_half_precision(factor):               # findings 3.4
    """m times 1.002 moves the mean of bfloat16 outputs and weights by 1.002, not by nothing."""
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).bfloat16()
    tuned = burnish.tune(model, "dora(rank=4)", targets="0", head=False)
    (_, length), = tuned.terms(Magnitude)
    x = torch.randn(512, 256).bfloat16()
    before = model(x).detach().double()
    with torch.no_grad():
        length.m.mul_(factor)
    after = model(x).detach().double()
    ratio = float((after * before).sum() / before.square().sum())
    assert abs(ratio - factor) < 2e-4
