"""What every backward written here needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.weight.backward import again, as_then, through, uncast
from burnish.core.call import Call, current, resume


def test_it_is_the_function_with_the_gradients_of_all_it_reads():
    """x and what trains get theirs, from one backward; what is frozen or unread gets none."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    A = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    frozen, unread = torch.randn(4, dtype=torch.float64), torch.randn(2, requires_grad=True)
    y = again(lambda x: F.linear(x, A) * frozen, x, (frozen, A, unread))
    want = F.linear(x, A) * frozen
    assert torch.equal(y, want)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, A, unread], g, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(want, [x, A], g), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert got[2] is None


def test_an_input_that_needs_no_gradient_gets_none():
    x, A = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    y = again(lambda x: F.linear(x, A), x, (A,))
    (dA,) = torch.autograd.grad(y.sum(), A)
    torch.testing.assert_close(dA, x.sum(0).expand(4, 3))
    frozen = torch.randn(4, 3)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(again(lambda x: F.linear(x, frozen), x, (frozen,)).sum(), x)
    torch.testing.assert_close(dx, frozen.sum(0).expand(5, 3))


def test_nothing_but_x_is_kept():
    kept = []
    x, A = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        again(lambda x: torch.tanh(A.sum()) * F.linear(F.linear(x, A), A), x, (A,))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), A.data_ptr()}


@pytest.mark.parametrize("which", ["x", "theta"])
def test_what_changed_before_backward_is_an_error(which):
    x, A = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = again(lambda x: F.linear(x, A), x, (A,))
    with torch.no_grad():
        (x if which == "x" else A).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_it_is_differentiated_once():
    x, A = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = again(lambda x: F.linear(x, A) ** 2, x, (A,))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_its_own_precision_stands_under_autocast():
    """Forward and backward multiply in the tensors' precision, whatever autocast would make."""
    x, A = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = again(lambda x: F.linear(x, A), x, (A,))
        y.sum().backward()
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, A))
    assert torch.equal(x.grad, A.detach().sum(0).expand(5, 3).contiguous())
    seen = []

    @uncast
    def told(ctx, t, more):
        seen.append((ctx, more, torch.is_autocast_enabled("cpu")))
        return 7

    with torch.autocast("cpu", torch.bfloat16):
        assert told("ctx", x, "more") == 7
        assert torch.is_autocast_enabled("cpu")
    assert seen == [("ctx", "more", False)]


def test_backward_runs_in_the_call_of_its_forward():
    calls = []
    x, A = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def fn(x):
        calls.append(current())
        return F.linear(x, A)

    then = Call()
    with resume(then):
        y = again(fn, x, (A,))
    y.sum().backward()
    assert calls == [then, then] and current() is None

    @as_then
    def backward(ctx, g):
        return current(), g

    ctx = type("Ctx", (), {"call": then})()
    assert backward(ctx, 3) == (then, 3)


def test_in_a_compiled_graph_it_is_a_part_of_the_graph():
    """A function of W inside torch.compile: outputs and gradients, with no break of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8))
    tuned = burnish.tune(net, "bone(rank=4)", head=False)
    for p in tuned.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 8)
    want = net(x)
    (gw,) = torch.autograd.grad(want.square().sum(), list(tuned.parameters()))
    got = torch.compile(net, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    (gg,) = torch.autograd.grad(got.square().sum(), list(tuned.parameters()))
    torch.testing.assert_close(gg, gw)


# -- a weight that is made of others --------------------------------------------------------------
class Counted(TorchDispatchMode):
    def __init__(self):
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@settings(deadline=None)
@given(tokens=st.integers(1, 6), inp=st.integers(1, 5), out=st.integers(1, 5), lead=st.booleans(),
       want_x=st.booleans(), want_t=st.booleans())
def test_a_made_weight_has_the_gradients_of_all_it_is_made_of(tokens, inp, out, lead, want_x,
                                                              want_t):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*((2,) if lead else ()), tokens, inp, dtype=torch.float64, generator=g)
    t = torch.randn(out, inp, dtype=torch.float64, generator=g)
    still, idle = torch.randn(out, 1, dtype=torch.float64, generator=g), torch.zeros(3)
    x.requires_grad_(want_x), t.requires_grad_(want_t), idle.requires_grad_(want_t)
    y = through(x, None, lambda: still * torch.sin(t), (t, still, idle))
    want = F.linear(x, still * torch.sin(t))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    wanted = [v for v in (x, t, idle) if v.requires_grad]
    if wanted:
        dy = torch.randn(want.shape, dtype=torch.float64, generator=g)
        got = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        theirs = torch.autograd.grad(want, wanted, dy, allow_unused=True)
        for a, b in zip(got, theirs, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_made_weight_is_made_twice_and_multiplied_three_times():
    x, t, made = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True), []
    with Counted() as products:
        y = through(x, None, lambda: made.append(1) or torch.sin(t), (t,))
        assert (products.products, len(made)) == (1, 1)
        y.sum().backward()
    assert (products.products, len(made)) == (3, 2)


def test_of_a_made_weight_nothing_is_kept_and_of_x_only_where_it_is_asked():
    x, t = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32)
    for trains in (True, False):
        kept = []
        t.requires_grad_(trains)
        with torch.autograd.graph.saved_tensors_hooks(lambda v, k=kept: k.append(v) or v,
                                                      lambda v: v):
            through(x, None, lambda: torch.sin(t), (t,))
        assert {v.data_ptr() for v in kept} == {t.data_ptr(), *([x.data_ptr()] if trains else [])}


def test_a_weight_that_is_at_hand_is_taken():
    x, t = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    kept = torch.randn(4, 3)
    assert torch.equal(through(x, kept, lambda: torch.sin(t), (t,)), F.linear(x, kept))


@pytest.mark.parametrize("which", ["x", "theta"])
def test_what_a_made_weight_reads_may_not_change_before_backward(which):
    x, t = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = through(x, None, lambda: torch.sin(t), (t,))
    with torch.no_grad():
        (x if which == "x" else t).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
