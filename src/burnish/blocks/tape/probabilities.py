"""A softmax whose probabilities wait in a few bits, and whose gradient is right in the mean.

A row of P is coded on 2^k levels of step ``s = max(P) / (2^k - 1)``, from 0 on:

    q = floor(P / s + u),  u uniform in [0, 1)        P^ = s q,  E[P^] = P,  and 0 stays 0

The gradient ``dx_i = P_i (g_i - sum_j g_j P_j)`` is linear in each product P_i P_j of two entries,
whose codes are independent; only P_i^2 is not right in the mean, since ``E[P^_i^2]`` is P_i^2 and
the variance of P^_i. With u drawn again, ``P~ = s (q - u + 1/2)`` is a second estimate, and

    E[P^ (2 P~ - P^)] = P^2                            so, as P^ - P~ = s (u - 1/2),

    dx_i = P^_i (g_i (1 + 2 s (u_i - 1/2)) - sum_j g_j P^_j)

has the mean that the exact gradient is. Kept: k/8 bytes an entry, s per row, a seed. P itself may
be kept by whoever reads it; a product keeps a code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .codes import packed, pieces, unpacked
from .functions import once_differentiable


class Softmax(torch.autograd.Function):
    """``run(x)`` exactly, over the last axis; kept in `bits`. seed: of u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], bits: int, seed: int
                ) -> Tensor:
        y = run(x)
        ctx.bits, ctx.seed, ctx.dtype, ctx.shape = bits, seed, x.dtype, x.shape
        rows, top = y.reshape(-1, y.shape[-1]), 2 ** bits - 1
        wide = torch.promote_types(y.dtype, torch.float32)
        step = rows.amax(1, keepdim=True).to(wide) / top
        per = 8 // bits
        code = torch.empty(-(-y.numel() // per), dtype=torch.uint8, device=y.device)
        for a, b, at, u in _parts(rows, bits, seed, wide):
            q = rows[at].to(wide) / step[at].masked_fill(step[at] == 0, 1)
            q = q.add_(u).floor_().clamp_(0, top).to(torch.uint8)
            code[a // per:-(-b // per)] = packed(q.view(-1), bits)
        ctx.save_for_backward(code, step)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        code, step = ctx.saved_tensors
        per, rows = 8 // ctx.bits, g.reshape(-1, g.shape[-1])
        dx = torch.empty(rows.shape, dtype=ctx.dtype, device=g.device)
        for a, b, at, u in _parts(rows, ctx.bits, ctx.seed, step.dtype):
            s, h = step[at], rows[at].to(step.dtype)
            P = unpacked(code[a // per:-(-b // per)], ctx.bits, b - a).to(s.dtype).view_as(h) * s
            mean = (h * P).sum(1, keepdim=True)
            dx[at] = P * (h * (1 + 2 * s * (u - 0.5)) - mean)
        return dx.view(ctx.shape), None, None, None


def _parts(rows: Tensor, bits: int, seed: int, wide: torch.dtype
           ) -> Iterator[tuple[int, int, slice, Tensor]]:
    """(first and last entry, rows, u) of what is worked on at once; the same u every time."""
    width = rows.shape[1]
    draw = None if rows.device.type == "meta" else torch.Generator(rows.device).manual_seed(seed)
    for a, b in pieces(rows.numel(), width * (8 // bits)):
        u = torch.rand((b - a) // width, width, generator=draw, dtype=wide, device=rows.device)
        yield a, b, slice(a // width, b // width), u
