"""Rows as length times direction, against a dense reference with the norm held constant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.weight import panels
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.provided import Weighted, linear
from burnish.core.site import Place

OUT, IN, N = 12, 10, 5
PLACE = Place("layer", "weight", "linear", OUT, IN)


def chain():
    term = Chain(PLACE, 3, 0.7, dtype=torch.float64)
    torch.nn.init.normal_(term.B)
    return term


def reference(W, term, m):
    """diag(m / c) V with c a constant."""
    V = W + 0.7 * term.B @ term.A
    return (m / V.norm(dim=1).detach())[:, None] * V


@pytest.mark.parametrize("panel", [panels.PANEL, 4 * OUT], ids=["one panel", "many panels"])
def test_gradients_equal_the_reference_with_a_constant_norm(panel, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    W = torch.randn(OUT, IN, dtype=torch.float64)
    term, wrap = chain(), Magnitude(W)
    torch.nn.init.uniform_(wrap.m, 0.5, 2.0)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64)
    g = torch.randn(N, OUT, dtype=torch.float64)
    wanted = [x, term.A, term.B, wrap.m]
    y = linear(x, Weighted(lambda: W, [(term, 1.0)], wrap), bias)
    ref = F.linear(x, reference(W, term, wrap.m), bias)
    torch.testing.assert_close(y, ref, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(ref, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_start_is_the_base():
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64)
    wrap = Magnitude(W)
    torch.testing.assert_close(linear(x, Weighted(lambda: W, [], wrap), None), F.linear(x, W),
                               rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(wrap.m.detach(), W.norm(dim=1))


def test_the_length_of_v_does_not_matter():
    """Scaling V leaves W' unchanged."""
    V, wrap = torch.randn(OUT, IN, dtype=torch.float64), Magnitude(torch.randn(OUT, IN).double())
    torch.testing.assert_close(wrap.of(7.3 * V), wrap.of(V))


def test_a_row_of_zeros_passes_and_stays_finite():
    W = torch.randn(OUT, IN, dtype=torch.float64)
    W[4] = 0
    wrap = Magnitude(W)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    y = linear(x, Weighted(lambda: W, [], wrap), None)
    dx, dm = torch.autograd.grad(y.square().sum(), [x, wrap.m])
    assert torch.equal(y[:, 4], torch.zeros(N, dtype=torch.float64))
    assert dx.isfinite().all() and float(dm[4]) == 0
    term = chain()                          # a row that the update alone fills has gain m / c
    got = linear(x, Weighted(lambda: W, [(term, 1.0)], wrap), None)
    torch.testing.assert_close(got, F.linear(x, reference(W, term, wrap.m)))


def test_a_half_precision_base_keeps_its_lengths_in_fp32():
    W = torch.randn(OUT, IN).bfloat16()
    wrap = Magnitude(W)
    assert wrap.m.dtype == torch.float32
    torch.testing.assert_close(wrap.m.detach(), W.float().norm(dim=1))
    with torch.no_grad():
        wrap.m.mul_(torch.linspace(0.5, 2.0, OUT))
    x = torch.randn(N, IN).bfloat16()
    got = linear(x, Weighted(lambda: W, [], wrap), None)
    exact = (x.double() @ W.double().t()) * (wrap.m.detach().double() / W.double().norm(dim=1))
    below = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)   # one spacing
    sums = 2.0**-18 * (x.double().abs() @ W.double().abs().t())                    # fp32 products
    assert ((got.double() - exact).abs() <= 0.51 * below + sums).all()


def test_two_numbers_an_output_are_kept_besides_what_the_chain_keeps():
    """Neither V nor the base's output waits for backward."""
    kept = []
    W, x = torch.randn(OUT, IN), torch.randn(N, IN, requires_grad=True)
    term = Chain(PLACE, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t,
                                                  lambda t: t):
        y = linear(x, Weighted(lambda: W, [(term, 1.0)], Magnitude(W)), None)
    assert sorted(kept) == [(N, 3), (N, IN)]
    assert y.grad_fn.gain.shape == y.grad_fn.wrap_kept.shape == (OUT,)
