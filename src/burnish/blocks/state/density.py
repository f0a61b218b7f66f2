"""How many of an MLP's inner numbers are not zero, as a smooth count that rides on the loss.

    l(x) = mean x^2 / (x^2 + eps),     dl/dx = 2 eps x / (x^2 + eps)^2 / n

the mean over the n numbers of tokens that are no padding. As eps falls it becomes the share of
numbers that are not zero; its gradient is largest at ``|x| = sqrt(eps / 3)``. In fp32 whatever x is
in: x^2 underflows in half precision just where the gradient lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import call_of
from ...core.followed import compiling
from ..tape.codes import pieces
from ..tape.functions import applied, once_differentiable, transformed
from ..weight.experts import counted
from .prompts import Listener


def density(x: Tensor, valid: Tensor | None = None, eps: float = 1e-7) -> Tensor:
    """l(x), a scalar in fp32 at least. valid: (...) of x (..., width). Keeps nothing but x."""
    if transformed() or compiling():
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        each = (square / (square + eps)).mean(-1)
        v = torch.ones_like(each) if valid is None else valid.to(each.dtype)
        return (each * v).sum() / v.sum().clamp_min(1)
    made: Tensor = applied(_Density, x, valid, eps)
    return made


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        for rows, v in _rows(x, valid):
            square = rows.to(wide).square()
            each = square.div_(square + eps).sum(1)
            total += each.sum() if v is None else (each * v.to(wide)).sum()
        tokens = total.new_full((), x.numel() // x.shape[-1]) if valid is None else \
            valid.sum().to(wide).clamp_min(1)
        n = tokens * x.shape[-1]
        ctx.save_for_backward(x, valid, n)
        ctx.eps = eps
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x, valid, n), eps = ctx.saved_tensors, ctx.eps
        made = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
        scale, a = g / n * (2 * eps), 0
        for rows, v in _rows(x, valid):
            w = rows.to(n.dtype)
            d = w * scale / (w.square() + eps).square_()
            made[a:a + len(d)] = d if v is None else d * v.to(d.dtype).unsqueeze(1)
            a += len(d)
        return made.view(x.shape), None, None


def _rows(x: Tensor, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some tokens at a time: (k, width), with which of them count."""
    flat, counts = x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)
    for a, b in pieces(flat.numel(), x.shape[-1]):
        at = slice(a // x.shape[-1], b // x.shape[-1])
        yield flat[at], None if counts is None else counts[at]


class Dense(Listener):
    """Listens to the last linear of an MLP: the density of what it reads, times `weight`, rides on
    the loss from there."""

    changes = False

    def __init__(self, state: Any, adapter: str, weight: float, eps: float):
        super().__init__(state, adapter)
        self.weight, self.eps = weight, eps

    def check(self, call: Any) -> None:
        pass                                     # it has no part in the answer

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        y, here, riding = call(*args, **kw), call_of(self.state), self.state.riding
        if here is None or here.off or not dict(here.active).get(self.adapter) \
                or not riding.wanted:
            return y
        x = args[0] if args else next(iter(kw.values()))
        if not x.requires_grad and riding.collected is None:
            return y                             # nothing that trains moves it
        return riding.on(y, density(x, counted(x), self.eps), self.weight)
