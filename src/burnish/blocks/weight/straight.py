"""Linears that compute with rounded weights on rounded inputs, and gradients straight through.

    y = q_x(x) q_w(V)^T + b          dx = (dy q_w(V)) * m_x,   dV = (dy^T q_x(x)) * m_w

V is the weight and all that is added to it; m are one where a number was inside the range of its
grid. Backward keeps the codes of the input (and the mask, one bit a number, where something can lie
outside); the rounded weight is made again there.

A method says how its numbers are rounded by overriding :class:`Straight`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.call import current
from ...core.errors import RecipeError
from ..tape import cast
from ..tape.codes import packed, unpacked
from ..tape.functions import applied, once_differentiable, shaped
from .backward import as_then, uncast
from .folded import NOTHING
from .provided import Weighted, Wrap
from .pruned import packed as bits
from .pruned import unpacked as unbits


class Straight(Wrap):
    """How the numbers of one linear are rounded."""

    def code(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the tokens."""
        raise NotImplementedError

    def opened(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The rounded tokens, (N, in)."""
        raise NotImplementedError

    def passed(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the tokens, from that of the rounded ones."""
        raise NotImplementedError

    def pulled(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of its own tensors (`theta`) from that of the rounded tokens; None for one that
        they do not read."""
        return ()

    def ready(self, V: Tensor) -> Tensor:
        """What of the weight is rounded: differentiable, linear or nearly so."""
        return V

    def rounded(self, made: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:
        """(values of the weight V, made ready, where that is inside its range; None: everywhere);
        no gradients are asked of it."""
        raise NotImplementedError

    def restored(self, V: Tensor) -> Tensor:
        """A rounded weight in the coordinates of the module's own: what `ready` turned, back."""
        return V

    def of(self, V: Tensor) -> Tensor:
        """The rounded weight as the module's coordinates have it, with gradients straight through;
        its tokens are another matter."""
        made = self.ready(V)
        values, inside = self.rounded(made.detach(), V.detach())
        through = made if inside is None else made * inside
        return self.restored(values.to(made.dtype) + (through - through.detach()))

    def undropped(self) -> None:
        raise RecipeError(f"{type(self).__name__} rounds what its linear reads, which has no form "
                          "that torch.func or forward-mode differentiation can transform here")

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        made, dtype = op.made(x), x.dtype

        def values() -> Tensor:
            V = op.unwrapped.dense(op.base() if weight is None else weight)
            return self.rounded(self.ready(V), V)[0].to(dtype)

        if not torch.is_grad_enabled():
            size = made.small("entries", lambda: op.base().numel()) if made is not NOTHING else 0
            W = made.large("weight", size * x.element_size(), values)
            with cast.uncast(x):
                rows = self.opened(self.code(x.reshape(-1, x.shape[-1])), dtype)
                y = rows @ (values() if W is None else W).t()
            y = shaped(y, (*x.shape[:-1], y.shape[-1]))
        else:
            reads = (*op.theta(), *(op.held() if weight is None else (weight,)))
            y = applied(_Straight, x, self, op, weight is not None, *reads)
        return y if bias is None else y + bias.to(y.dtype)


class _Straight(torch.autograd.Function):
    @staticmethod
    def inner(ctx: Any) -> tuple[Tensor, Tensor]:
        """The weight made ready to be rounded, and as it is."""
        op: Weighted = ctx.op
        V = op.unwrapped.dense(ctx.reads[-1] if ctx.trained else op.base())
        return ctx.how.ready(V), V.detach()

    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, how: Straight, op: Weighted, trained: bool, *reads: Tensor
                ) -> Tensor:
        ctx.how, ctx.op, ctx.trained, ctx.reads = how, op, trained, reads
        ctx.call, ctx.shape, ctx.dtype = current(), x.shape, x.dtype
        kept = how.code(x.reshape(-1, x.shape[-1]))
        y = how.opened(kept, x.dtype) @ how.rounded(*_Straight.inner(ctx))[0].to(x.dtype).t()
        ctx.n = len(kept)
        ctx.save_for_backward(*kept, *reads)
        return shaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        how: Straight = ctx.how
        kept = ctx.saved_tensors[: ctx.n]        # refuses what has changed since
        need_x, *needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
        g2 = g.reshape(-1, g.shape[-1])
        with torch.enable_grad():
            made, V = _Straight.inner(ctx)
        values, inside = how.rounded(made.detach(), V)
        own = {id(t) for t in how.theta()}
        needs_own = any(n and id(t) in own for t, n in zip(ctx.reads, needs, strict=True))
        dx, found = None, dict.fromkeys(own)
        if need_x or needs_own:
            dq = g2 @ values.to(g2.dtype)
            if needs_own:
                found = dict(zip(map(id, how.theta()), how.pulled(dq, kept), strict=True))
            dx = shaped(how.passed(dq, kept), ctx.shape) if need_x else None
        grads: list[Tensor | None] = [found.get(id(t)) if n else None
                                      for t, n in zip(ctx.reads, needs, strict=True)]
        needs = [n and id(t) not in own for t, n in zip(ctx.reads, needs, strict=True)]
        wanted = [t for t, need in zip(ctx.reads, needs, strict=True) if need]
        if wanted:
            dV = (g2.t() @ how.opened(kept, ctx.dtype)).to(made.dtype)
            if inside is not None:
                dV.mul_(inside)
            got = iter(torch.autograd.grad(made, wanted, dV, allow_unused=True))
            grads = [next(got) if need else g for need, g in zip(needs, grads, strict=True)]
        return dx, None, None, None, *grads


# -- tokens on a grid of their own ----------------------------------------------------------------
def token_codes(x: Tensor, bits_: int, span: float = 1.0) -> tuple[Tensor, ...]:
    """(codes, scale (N, 1), zero point (N, 1), mask) of tokens (N, in), each on the grid of
    2^bits whole numbers that spans `span` of its range, and zero. The mask, of what is not clipped,
    is empty where nothing is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    top = 2**bits_ - 1
    low = wide.amin(-1, keepdim=True).clamp_max(0) * span
    high = wide.amax(-1, keepdim=True).clamp_min(0) * span
    scale = ((high - low) / top).clamp_min(torch.finfo(wide.dtype).tiny)
    zero = (-low / scale).round_()
    q = (wide / scale).round_().add_(zero)
    mask = bits((q >= 0) & (q <= top)) if span < 1 else q.new_empty(0, dtype=torch.uint8)
    codes = packed(q.clamp_(0, top).to(torch.uint8).flatten(), held(bits_))
    return codes, scale, zero.to(torch.uint8), mask


def held(bits_: int) -> int:
    """Bits that a code takes where it is kept: those that fill bytes."""
    return next(b for b in (2, 4, 8) if b >= bits_)


def token_values(kept: tuple[Tensor, ...], bits_: int, width: int, dtype: torch.dtype) -> Tensor:
    """What :func:`token_codes` were of."""
    codes, scale, zero, _ = kept
    q = unpacked(codes, held(bits_), scale.shape[0] * width).view(-1, width)
    return q.to(scale.dtype).sub_(zero).mul_(scale).to(dtype)


def token_passed(g: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    """A gradient where nothing was clipped, zero elsewhere."""
    return g.masked_fill(~unbits(kept[3], g.shape), 0) if kept[3].numel() else g
