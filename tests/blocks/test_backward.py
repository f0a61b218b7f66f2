"""What every backward written here needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.backward import again, as_then, uncast
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
