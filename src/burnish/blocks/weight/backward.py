"""What every backward written here needs: no second cast, and the call of its forward; and a
backward for whatever may simply be run again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.call import current, resume
from ...core.followed import compiling
from .. import matmul
from ..tape import cast
from ..tape.functions import once_differentiable, shaped
from ..tape.roles import reading


def uncast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(ctx, tensor, ...)` in the tensors' own precision: autocast has had its say before."""
    @functools.wraps(fn)
    def run(ctx: Any, tensor: Tensor, *rest: Any) -> Any:
        with cast.uncast(tensor):
            return fn(ctx, tensor, *rest)
    return run


def as_then(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Terms and the base are asked again in the call of the forward, not in the present."""
    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        if compiling():
            return backward(ctx, g)
        with resume(ctx.call):
            return backward(ctx, g)
    return run


def again(fn: Callable[[Tensor], Tensor], x: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
    """``fn(x)``, linear in x, of which backward keeps nothing but x: it is run again there.

    theta: the tensors that fn reads; those that train get gradients. As in torch, changing them or
    x in place before backward is an error. Both gradients are linear in the x that is kept, so it
    is kept as the input of a linear (an unbiased code of it will do).
    """
    if compiling():
        return _Again.apply(x, fn, *theta)
    with reading((x,)):
        return _Again.apply(x, fn, *theta)


class _Again(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, fn: Callable[[Tensor], Tensor], *theta: Tensor) -> Tensor:
        ctx.fn, ctx.theta, ctx.call = fn, theta, current()
        ctx.save_for_backward(x, *theta)
        return fn(x)

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0]                 # refuses what has changed since
        need_x, _, *needs = ctx.needs_input_grad
        x = x.detach().requires_grad_(need_x)
        with torch.enable_grad():
            y = ctx.fn(x)
        wanted = [t for t, need in zip((x, *ctx.theta), (need_x, *needs), strict=True) if need]
        got = iter(torch.autograd.grad(y, wanted, g, allow_unused=True))
        dx = next(got) if need_x else None
        return dx, None, *[next(got) if need else None for need in needs]


#: (x, g, W, is dx asked?, is dW asked?) -> (dx, dW), None where it is not asked
Pull = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]


def of_linear(x_NI: Tensor, g_NO: Tensor, W: Tensor, need_x: bool, need_w: bool
              ) -> tuple[Tensor | None, Tensor | None]:
    """``dx = g W`` and ``dW = g^T x``."""
    return matmul.mm(g_NO, W) if need_x else None, matmul.tn(g_NO, x_NI) if need_w else None


def through(x: Tensor, kept: Tensor | None, made: Callable[[], Tensor], theta: tuple[Tensor, ...],
            product: Callable[[Tensor, Tensor], Tensor] = matmul.linear, pull: Pull = of_linear
            ) -> Tensor:
    """``product(x, W)``, linear in x and in W, a tensor that is made of others: ``W = made()``, or
    `kept`, which is the same. Backward keeps nothing but x, where a tensor of theta trains: W is
    made again there, and nothing is multiplied but for the gradients, by `pull`. Both are given
    tokens (N, in)."""
    if compiling():
        return _Through.apply(x, kept, made, product, pull, *theta)
    with reading((x,)):
        return _Through.apply(x, kept, made, product, pull, *theta)


class _Through(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, kept: Tensor | None, made: Callable[[], Tensor],
                product: Callable[[Tensor, Tensor], Tensor], pull: Pull, *theta: Tensor) -> Tensor:
        ctx.made, ctx.pull, ctx.theta, ctx.call, ctx.shape = made, pull, theta, current(), x.shape
        trains = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if trains else None, *theta)
        y = product(x.reshape(-1, x.shape[-1]), made() if kept is None else kept)
        return shaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0]                 # refuses what has changed since
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        wanted = [t for t, need in zip(ctx.theta, needs, strict=True) if need]
        g2, x2 = g.reshape(-1, g.shape[-1]), x if x is None else x.reshape(-1, x.shape[-1])
        with torch.set_grad_enabled(bool(wanted)):
            W = ctx.made()
        dx, dW = ctx.pull(x2, g2, W.detach(), need_x, bool(wanted))
        got = iter(torch.autograd.grad(W, wanted, dW, allow_unused=True) if wanted else ())
        return (None if dx is None else shaped(dx, ctx.shape), None, None, None, None,
                *[next(got) if need else None for need in needs])


def remade(fn: Callable[[], tuple[Tensor, ...]], theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What ``fn()`` makes of theta (and of what stays as it is), of which backward keeps nothing
    but theta: it is run again there."""
    return _Remade.apply(fn, *theta)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable[[], tuple[Tensor, ...]], *theta: Tensor
                ) -> tuple[Tensor, ...]:
        ctx.fn, ctx.theta, ctx.call = fn, theta, current()
        ctx.save_for_backward(*theta)
        return fn()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Remade.pulled(ctx, grads)

    @staticmethod
    @as_then
    def pulled(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Any, ...]:
        _ = ctx.saved_tensors                    # refuses what has changed since
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            made = ctx.fn()
        wanted = [t for t, need in zip(ctx.theta, needs, strict=True) if need]
        got = iter(torch.autograd.grad(made, wanted, grads, allow_unused=True))
        return None, *[next(got) if need else None for need in needs]
