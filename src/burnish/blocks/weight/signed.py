"""Linears and attentions of one bit: signs of weights, inputs, queries, keys, values and scores.

    sign(0) = 1;   gradients pass where a number is inside (-1, 1), and are zero elsewhere

What backward keeps of a number are two bits, its sign and whether its gradient passes. A product of
signs is a count: of n pairs, n less twice those that differ (:func:`counted`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import RecipeError
from ..state.attending import Attending, named
from ..tape.functions import applied, once_differentiable, transformed
from .pruned import packed, unpacked
from .straight import Straight


def row_bits(mask: Tensor) -> Tensor:
    """Truth values (..., n), eight to a byte, (..., ceil(n / 8)); each row begins a byte."""
    pad = -mask.shape[-1] % 8
    return packed(F.pad(mask, (0, pad)) if pad else mask).view(*mask.shape[:-1], -1)


def of_rows(bits: Tensor, n: int) -> Tensor:
    """The truth values again."""
    shape = torch.Size((*bits.shape[:-1], 8 * bits.shape[-1]))
    return unpacked(bits.flatten(), shape)[..., :n]


def signs(bits: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """1 where a bit is set, else -1."""
    return of_rows(bits, n).to(dtype).mul_(2).sub_(1)


def bits_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """(signs, where gradients pass), as bits of rows."""
    return row_bits(x >= 0), row_bits(x.abs() < 1)


def counted(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Products (N, O) of signs in rows of n, by counting the bits that differ: a (N, bytes), b (O,
    bytes). What one-bit hardware does; a reference here."""
    differ = a.unsqueeze(1) ^ b.unsqueeze(0)
    return n - 2 * sum(((differ >> k) & 1).sum(-1, dtype=torch.int64) for k in range(8))


class Signed(Straight):
    """``q_w(V)_o = alpha_o sign(V_o - mean_o)``, alpha_o the mean of ``|V_o|``; ``q_x`` the sign.

    rows: what shares a mean, the inputs of an output (1), or of a table the entries of a token
    (0, as tables are seen turned).
    """

    def __init__(self, inp: int, rows: int = 1):
        super().__init__()
        self.inp, self.rows = inp, rows

    def code(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        return bits_of(x_NI)

    def opened(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return signs(kept[0], self.inp, dtype)

    def passed(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return g_NI.masked_fill(~of_rows(kept[1], self.inp), 0)

    def ready(self, V: Tensor) -> Tensor:
        return V - V.mean(self.rows, keepdim=True)

    def rounded(self, made: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha = V.abs().mean(self.rows, keepdim=True)
        return torch.where(made >= 0, alpha, -alpha), made.abs() < 1


class OneBit(Attending):
    """``S = sign(q) sign(k)^T / sqrt(h) + mask``, ``P = 1[S > 0]``, ``P sign(v)``: no softmax."""

    part = "bibert"

    def attend(self, module: Any, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        if transformed():
            raise RecipeError("bibert: attention on signs has no form that torch.func or "
                              "forward-mode differentiation can transform")
        given = named(args, kwargs)
        q, k, v = given["query"], given["key"], given["value"]
        if k.shape[-3] != q.shape[-3]:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scale = given.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return applied(_OneBit, q, k, v, given.get("attn_mask"), bool(given.get("is_causal")),
                       float(scale), float(given.get("dropout_p") or 0.0))


class _OneBit(torch.autograd.Function):
    """Keeps two bits of each query, key and value, the mask, and a bit a score where it drops."""

    @staticmethod
    def scores(ctx: Any, q: Tensor, k: Tensor, mask: Tensor | None, drop: Tensor | None) -> Tensor:
        S = (q @ k.transpose(-1, -2)).mul_(ctx.scale)
        if mask is not None:
            S = S.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else S + mask
        if ctx.causal:
            seen = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril()
            S = S.masked_fill(~seen, float("-inf"))
        if drop is not None:                     # what is dropped is a score of zero
            S = (S / (1 - ctx.dropout)).masked_fill(~of_rows(drop, S.shape[-1]), 0)
        return S

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
                scale: float, dropout: float) -> Tensor:
        ctx.scale, ctx.causal, ctx.dropout = scale, causal, dropout
        ctx.widths, dtype = (q.shape[-1], v.shape[-1]), q.dtype
        kept = [b for t in (q, k, v) for b in bits_of(t)]
        drop = None
        if dropout:
            shape = (*q.shape[:-1], k.shape[-2])
            drop = row_bits(torch.rand(shape, device=q.device) >= dropout)
        Q, K = (signs(b, q.shape[-1], dtype) for b in (kept[0], kept[2]))
        P = _OneBit.scores(ctx, Q, K, mask, drop) > 0
        ctx.save_for_backward(*kept, mask, drop)
        return P.to(dtype) @ signs(kept[4], v.shape[-1], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        *kept, mask, drop = ctx.saved_tensors
        h, w = ctx.widths
        Q, K, V = (signs(b, n, g.dtype) for b, n in zip(kept[::2], (h, h, w), strict=True))
        S = _OneBit.scores(ctx, Q, K, mask, drop)
        dV = (S > 0).to(g.dtype).transpose(-1, -2) @ g
        dS = (g @ V.transpose(-1, -2)).masked_fill_(S.abs() >= 1, 0).mul_(ctx.scale)
        if drop is not None:
            dS = (dS / (1 - ctx.dropout)).masked_fill(~of_rows(drop, S.shape[-1]), 0)
        grads = (dS @ K, dS.transpose(-1, -2) @ Q, dV)
        return *(d.masked_fill(~of_rows(b, n), 0)
                 for d, b, n in zip(grads, kept[1::2], (h, h, w), strict=True)), *(None,) * 4
