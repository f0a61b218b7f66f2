"""Starts of a chain: their values, what leaves the base, and when nothing is made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.start import LessStart, begin
from burnish.core.errors import CheckError, RecipeError
from burnish.core.method import Method
from burnish.core.registry import register
from burnish.core.site import Place, Site

PLACE = Place("0", "weight", "linear", 12, 8)


def drawn(W, seen, rank, s):
    return torch.randn(rank, W.shape[1]).to(W), torch.randn(W.shape[0], rank).to(W)


@dataclass(frozen=True, kw_only=True)
class DrawnStart(Method):
    """Drawn: a residual whose factors are drawn at random."""

    def delta(self, site):
        return begin(LessStart(site.place, 3, 0.5), site, drawn)


register(DrawnStart, "drawn_start")


def made(seed, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12)).to(dtype)
    tuned = burnish.tune(net, "drawn_start", targets="0", seed=seed, head=False)
    (_, term), = tuned.terms(LessStart)
    return tuned, term


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_whatever_a_start_is_step_0_is_the_base_to_the_last_bit(dtype):
    tuned, term = made(1, dtype)
    x = torch.randn(5, 8).to(dtype)
    assert term.A.abs().sum() > 0 and term.B.abs().sum() > 0
    with tuned.disabled():
        want = tuned.model(x)
    assert torch.equal(tuned.model(x), want)


def test_outputs_and_gradients_are_those_of_the_residual():
    """W' = (W - s B0 A0) + s B A, in float64."""
    tuned, term = made(1)
    W, bias = (p.detach().clone() for p in (tuned.model[0].weight, tuned.model[0].bias))
    A0, B0 = term.A.detach().clone(), term.B.detach().clone()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    A, B = (p.detach().clone().requires_grad_() for p in (term.A, term.B))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    want = x @ ((W - 0.5 * B0 @ A0) + 0.5 * B @ A).t() + bias
    got = tuned.model(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.A, term.B], g),
                    torch.autograd.grad(want, [x, A, B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_a_start_draws_is_the_seeds():
    first = made(1)[1].A
    torch.manual_seed(99)
    assert torch.equal(made(1)[1].A, first)
    assert not torch.equal(made(2)[1].A, first)


def site(W, **kw):
    return Site(PLACE, W, **kw)


def test_a_chain_begins_with_the_factors_that_are_given():
    W = torch.randn(12, 8)
    one = begin(Chain(PLACE, 2, 3.0), site(W, seen="seen"),
                lambda W, seen, rank, s: (W[:rank] * s, None if seen == "seen" else W))
    assert torch.equal(one.A, W[:2] * 3) and not one.B.any()
    two = begin(Chain(PLACE, 2), site(W), lambda W, seen, rank, s: (W[:rank], W[:, :rank]))
    assert torch.equal(two.dense(), W[:, :2] @ W[:2])
    assert not (two.A.burnish_decay or two.B.burnish_decay or one.A.burnish_decay)
    frozen = begin(Chain(PLACE, 2, train_a=False), site(W),
                   lambda W, seen, rank, s: (W[:rank], None))
    assert not frozen.A.requires_grad and torch.equal(frozen.A, W[:2])


def test_a_start_in_half_precision_is_made_in_fp32():
    seen = []
    begin(Chain(PLACE, 2), site(torch.randn(12, 8).bfloat16()),
          lambda W, _, rank, s: (seen.append(W.dtype) or W[:rank], None))
    assert seen == [torch.float32]


def test_a_blank_site_makes_nothing():
    def never(*_):
        raise AssertionError("it was made")

    term = begin(LessStart(PLACE, 2, 1.0), site(torch.randn(12, 8), blank=True), never)
    assert term.A0.shape == (2, 8) and term.B0.shape == (12, 2)


@pytest.mark.parametrize("recipe", ["pissa(rank=2)", "pissa(rank=2, iterations=3)"])
def test_a_load_decomposes_nothing(recipe, tmp_path, monkeypatch):          # findings 3.1
    net = nn.Sequential(nn.Linear(8, 12))
    tuned = burnish.tune(net, recipe, targets="0", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(3, 8)
    want = net(x)
    tuned.save(tmp_path / "a")
    base = tuned.detach()

    def never(*_, **__):
        raise AssertionError("a load decomposes nothing")

    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, never)
    again = burnish.load(base, tmp_path / "a")
    assert torch.equal(again.model(x), want)
    monkeypatch.undo()
    again.add("second", recipe, targets="0")
    again.use("second")
    (_, term), = again.terms(LessStart)
    assert term.A0.any(), "what is added after a load begins as ever"


def test_an_approximate_decomposition_draws_nothing():
    """It used the global generator, whatever the seed of the adapter."""
    W = torch.randn(64, 48)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(48, 64))
        with torch.no_grad():
            net[0].weight.copy_(W)
        tuned = burnish.tune(net, "pissa(rank=4, iterations=2)", targets="0", head=False)
        (_, term), = tuned.terms(LessStart)
        starts.append(term.A0)
    assert torch.equal(*starts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["pissa(rank=2)", "pissa(rank=2, iterations=2)"])
def test_a_weight_that_is_not_finite_is_named(recipe, value):
    net = nn.Sequential(nn.Linear(8, 12))
    with torch.no_grad():
        net[0].weight[3, 2] = value
    with pytest.raises(CheckError, match="start at 0.weight"):
        burnish.tune(net, recipe, targets="0", head=False)
    assert not hasattr(net[0], "burnish")


def test_a_scale_that_cannot_be_divided_by_is_refused():
    with pytest.raises(RecipeError, match="positive scale, not 0.0"):
        burnish.tune(nn.Sequential(nn.Linear(8, 12)), "pissa(rank=2, alpha=0.0)", targets="0",
                     head=False)
