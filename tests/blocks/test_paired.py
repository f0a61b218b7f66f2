"""Updates of two thin factors, with no recipe, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.paired import Paired
from burnish.blocks.weight.panels import Panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.within import Within
from burnish.core.site import Place

N, IN, OUT, RANK = 6, 5, 7, 3
PLACE = Place("l", "weight", "linear", OUT, IN)


class Waves(Paired):
    """``Delta = tanh(B) diag(e^2) sin(A)``, and a tensor that nobody reads."""

    def __init__(self, inp=IN, out=OUT, rank=RANK, trains="ABe"):
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(torch.randn(rank, inp), requires_grad="A" in trains)
        self.e = nn.Parameter(torch.randn(rank), requires_grad="e" in trains)
        self.B = nn.Parameter(torch.randn(out, rank), requires_grad="B" in trains)
        self.idle = nn.Parameter(torch.zeros(2))
        self.double()

    def pair(self):
        return torch.sin(self.A), torch.tanh(self.B) * self.e**2


def delta(t):
    return torch.tanh(t.B) @ torch.diag(t.e**2) @ torch.sin(t.A)


def numbers(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alike(got, want, wanted, seed=3):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = numbers(*want.shape, seed=seed)
    if not want.requires_grad:                       # nothing of what it reads trains
        return
    theirs = torch.autograd.grad(want, wanted, g, allow_unused=True)
    for a, b in zip(torch.autograd.grad(got, wanted, g, allow_unused=True), theirs, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(deadline=None)
@given(inp=st.integers(1, 9), out=st.integers(1, 9), rank=st.integers(1, 4),
       tokens=st.integers(1, 9), scale=st.sampled_from([1.0, -0.3]),
       trains=st.sampled_from(["ABe", "A", "B", "e", "Ae", ""]), gain=st.booleans(),
       want_x=st.booleans())
def test_it_is_the_equation_with_the_gradients_of_what_trains(inp, out, rank, tokens, scale, trains,
                                                              gain, want_x):
    """Alone and under lengths of rows, whatever of it trains."""
    term, W, b = Waves(inp, out, rank, trains), numbers(out, inp), numbers(out, seed=2)
    x = numbers(tokens, inp, seed=4).requires_grad_(want_x)
    wrap = Magnitude(W) if gain else None
    y = linear(x, Weighted(lambda: W, [(term, scale)], wrap), b)
    V = W + scale * delta(term)
    if wrap is not None:
        V = (wrap.m / V.norm(dim=1).detach())[:, None] * V
    wanted = [t for t in (x, *term.parameters(), *([wrap.m] if wrap else [])) if t.requires_grad]
    alike(y, F.linear(x, V, b), wanted)


@pytest.mark.parametrize("made", [
    Waves, lambda: Chain(PLACE, RANK, 0.7, dtype=torch.float64)])
def test_of_a_frozen_second_factor_the_lengths_learn_all_the_same(made):
    term, W = made(), numbers(OUT, IN)
    nn.init.normal_(term.B)
    term.B.requires_grad_(False)
    x, wrap = numbers(N, IN), Magnitude(W)
    V = W + term.dense()
    want = F.linear(x, (wrap.m / V.norm(dim=1).detach())[:, None] * V)
    alike(linear(x, Weighted(lambda: W, [(term, 1.0)], wrap), None), want, [term.A, wrap.m])


def test_what_it_says_of_the_whole_update():
    term, x = Waves(), numbers(N, IN)
    D = delta(term)
    A, B = term.low_rank()
    part, base = D[:, 1:3], numbers(OUT, 2)
    for got, want in ((term.dense(), D), (term.product(x), x @ D.t()), (term.panel(1, 3), part),
                      (term.tile(1, 3, None), part), (B @ A, D),
                      (term.upon(base, 1, 3, None, 0.5), base + 0.5 * part)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not term.tile(0, IN, None).requires_grad


@pytest.mark.parametrize("base, own", [
    (torch.float64, torch.float32), (torch.float32, torch.float64),
    (torch.bfloat16, torch.float32)])
def test_panels_are_in_the_precision_of_the_base(base, own):
    W = numbers(OUT, IN).to(base)
    for term in (Waves().to(own), Chain(PLACE, RANK, 0.7).to(own)):
        with torch.no_grad():
            V = Panels(W, [(term, 0.5)], [None]).value(0, IN)
            want = (W.double() + 0.5 * term.dense().double()).to(base)
        assert V.dtype == base
        rtol = 0.01 if base == torch.bfloat16 else 1e-5
        torch.testing.assert_close(V, want, rtol=rtol, atol=1e-6)


def test_in_half_precision_factors_are_cast_and_gradients_are_not():
    term = Waves().float()
    x = numbers(N, IN).bfloat16().requires_grad_()
    y = linear(x, Weighted(lambda: numbers(OUT, IN).bfloat16(), [(term, 1.0)]), None)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and term.A.grad.dtype == torch.float32


def test_rows_of_a_fused_matrix():
    term, W, x = Waves(out=4), numbers(OUT, IN), numbers(N, IN).requires_grad_()
    rows = Within(term, (2, 6), OUT)
    V = W + F.pad(delta(term), (0, 0, 2, 1))
    alike(linear(x, Weighted(lambda: W, [(rows, 1.0)]), None), F.linear(x, V),
          [x, term.A, term.B, term.e])


class Products(TorchDispatchMode):
    def __init__(self):
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_,
                                   torch.ops.aten.baddbmm, torch.ops.aten.bmm):
            a, b = args[-2:]
            self.sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return out


def test_tokens_meet_nothing_but_thin_factors():
    """Two thin products forward, four backward; nothing of the weight's size is made."""
    term, x = Waves(64, 48, 2), numbers(40, 64).requires_grad_()
    with Products() as forward:
        y = linear(x, Weighted(lambda: numbers(48, 64), [(term, 1.0)]), None)
    with Products() as backward:
        y.sum().backward()
    thin = [40 * 64 * 2, 40 * 48 * 2]
    assert sorted(forward.sizes) == sorted([40 * 64 * 48, *thin])
    assert sorted(backward.sizes) == sorted([40 * 64 * 48, *thin, *thin])
