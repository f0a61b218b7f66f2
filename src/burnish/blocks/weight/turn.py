"""Functions of W told on tokens: what happens to x before the product, and to y behind it.

    y = after(before(x) V^T) + b,  V the base and all added terms

A method gives :meth:`Turn.before` or :meth:`Turn.after`, linear in their argument and built of
ordinary differentiable operations on its own small tensors; no autograd function is written by
hand, and V may be held in any form, since it is never turned itself. `of`, the same on the weight,
follows from them; it serves merging and modules that read their weight by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.call import current
from .backward import as_then, uncast
from .provided import Weighted, Wrap, linear


class Turn(Wrap):
    """``W' x = after(V before(x))``.

    Kept for backward: x alone, for `before` (its result is made again); where an `after` is given
    the product is made again too. A term or a trained weight under a `before` keeps the turned x
    besides.
    """

    def before(self, x_NI: Tensor) -> Tensor:
        """The tokens that the weight is given, (N, in)."""
        return x_NI

    def after(self, y_NO: Tensor) -> Tensor:
        """What is made of the product, (N, out)."""
        return y_NO

    def of(self, V: Tensor) -> Tensor:
        """W' as an (out, in) tensor: ``before`` and ``after`` on unit vectors."""
        if type(self).before is not Turn.before:
            V = V @ self.before(torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)).t()
        if type(self).after is not Turn.after:
            V = self.after(torch.eye(V.shape[-2], dtype=V.dtype, device=V.device)).t() @ V
        return V

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor:
        inner, theta = op.unwrapped(), self.theta()
        x2 = x.reshape(-1, x.shape[-1])
        if type(self).after is Turn.after:
            y = linear(again(self.before, x2, theta), inner, bias, weight)
            return y.view(*x.shape[:-1], y.shape[-1])
        own = theta if weight is None else (*theta, weight)

        def product(x_NI: Tensor) -> Tensor:
            return self.after(linear(self.before(x_NI), inner, None, weight))

        y = again(product, x2, (*own, *inner.theta()))
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def again(fn: Callable[[Tensor], Tensor], x: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
    """``fn(x)``, of which backward keeps nothing but x: it is run again there.

    theta: the tensors that fn reads and gradients are wanted for. As in torch, changing them or x
    in place before backward is an error.
    """
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
