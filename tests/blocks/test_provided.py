"""Fast paths against the dense, obvious form, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.weight import panels, tiled
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.site import Place

OUT, IN, N = 24, 20, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)


def chain(**kw):
    term = Chain(PLACE, 4, 0.7, dtype=torch.float64, **kw)
    torch.nn.init.normal_(term.B)
    return term


def kernel(mixed=True, s=0.6, **kw):
    return KernelDelta(PLACE, 8, s, mixed, **kw).double()


TERMS = {
    "chain": lambda: [chain()],
    "frozen A": lambda: [chain(train_a=False)],
    "snell": lambda: [kernel(mixed=False)],
    "snella": lambda: [kernel()],
    "snella dense": lambda: [kernel(s=0.0)],
    "snell linear": lambda: [kernel(mixed=False, s=0.0, magnitude="linear")],
    "snell p=1": lambda: [kernel(mixed=False, norm_p=1.0)],
    "chain + snella": lambda: [chain(), kernel()],
}


def both(terms, wrap, weight, bias, x, scale=1.0):
    """(output, gradients) of the fast path and of the dense reference."""
    op = Weighted(lambda: weight, [(t, scale) for t in terms], wrap)
    g = torch.randn(N, OUT, dtype=torch.float64)
    params = [p for t in op.all for p in t.parameters() if p.requires_grad]
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast = linear(x1, op, bias)
    slow = F.linear(x2, op.dense(weight), bias)
    return (fast, torch.autograd.grad(fast, [x1, *params], g),
            slow, torch.autograd.grad(slow, [x2, *params], g))


@pytest.mark.parametrize("wrapped", [False, True], ids=["sum", "magnitude"])
@pytest.mark.parametrize("panel", [panels.PANEL, 5 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("name", TERMS)
def test_linear_equals_dense_reference(name, panel, wrapped, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(panels, "PANEL", panel)
    monkeypatch.setattr(tiled, "PANEL", panel)
    monkeypatch.setattr(tiled, "STRIP", 3 * OUT)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    bias = torch.randn(OUT, dtype=torch.float64)
    wrap = Magnitude(weight) if wrapped else None
    x = torch.randn(N, IN, dtype=torch.float64)
    fast, g_fast, slow, g_slow = both(TERMS[name](), wrap, weight, bias, x, scale=0.9)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for a, b in zip(g_fast, g_slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("wrapped", [False, True], ids=["sum", "magnitude"])
@pytest.mark.parametrize("name", TERMS)
def test_effective_weight_equals_dense_reference(name, wrapped, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(panels, "PANEL", 6 * OUT)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    op = Weighted(lambda: weight, [(t, 1.0) for t in TERMS[name]()],
                  Magnitude(weight) if wrapped else None)
    params = [p for t in op.all for p in t.parameters() if p.requires_grad]
    G = torch.randn(OUT, IN, dtype=torch.float64)
    fast, slow = op.effective(weight), op.dense(weight)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(fast, params, G), torch.autograd.grad(slow, params, G),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_frozen_linear_with_a_provider_keeps_nothing():
    weight = torch.randn(OUT, IN)
    kept = []
    x = torch.randn(N, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, Weighted(lambda: weight.clone(), []), None)
    assert kept == []


def test_frozen_a_keeps_rank_numbers_per_token():
    kept = []
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    term = chain(train_a=False)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t,
                                                  lambda t: t):
        linear(x, Weighted(lambda: weight, [(term, 1.0)]), None)
    assert kept == [torch.Size([N, 4])]


def test_dropout_is_drawn_again_not_kept():
    torch.manual_seed(0)
    term = chain(dropout=0.5)
    weight = torch.zeros(OUT, IN, dtype=torch.float64)
    x = torch.randn(64, IN, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    y = linear(x, Weighted(lambda: weight, [(term, 1.0)]), None)
    got = torch.autograd.grad(y.square().sum(), [x, term.A, term.B])
    torch.set_rng_state(state)
    ref = 0.7 * F.dropout(x, 0.5, True) @ term.A.t() @ term.B.t()
    want = torch.autograd.grad(ref.square().sum(), [x, term.A, term.B])
    torch.testing.assert_close(y, ref)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
