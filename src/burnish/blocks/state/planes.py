"""Pairs of channels of a hidden state, turned and scaled plane by plane.

    y_a = c_a h_a - s_a h_b,   y_b = c_b h_b + s_b h_a

Channels count in groups: the k-th of a group's first half meets the k-th of its second half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ...core.followed import compiling
from ..tape.functions import applied, once_differentiable, shaped, transformed
from .gates import out_first, value_of

#: numbers that are turned at a time on a processor
STRIP = 1 << 17


class Planes(nn.Module):
    """``c = alpha cos theta``, ``s = alpha sin theta`` on runs of the last axis.

    theta, alpha (n,), group by group; the start is theta = 0, alpha = 1. own: 1, an angle and a
    length for the two channels of a plane, n = channels / 2; 2, for each channel, n = channels; 4,
    for c and for s of each channel, n = 2 channels: of a group the numbers of c, then those of s.
    rows: runs ``(start, stop)`` that are turned; None turns all.

    Kept for backward: h. Decay would pull alpha to zero, so both are marked to be left alone by it.
    """

    def __init__(self, channels: int, group: int, own: int = 1,
                 rows: tuple[tuple[int, int], ...] | None = None):
        super().__init__()
        self.channels, self.group, self.own, self.rows = channels, group, own, rows
        n = (channels if rows is None else sum(b - a for a, b in rows)) * own // 2
        self.theta, self.alpha = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.ones(n))
        for p in self.parameters():
            p.burnish_decay = False                      # type: ignore[attr-defined]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(c, s), each (groups, 2, group / 2), differentiable."""
        shape = (-1, self.own, self.group // 2)
        theta, alpha = self.theta.view(shape), self.alpha.view(shape)
        (t, u), (a, b) = ((x[:, :2], x[:, 2:]) if self.own == 4 else (x, x) for x in (theta, alpha))
        c, s = a * torch.cos(t), b * torch.sin(u)
        return c.expand(-1, 2, -1), s.expand(-1, 2, -1)

    def forward(self, h: Tensor) -> Tensor:
        c, s = self.factors()
        if self.rows is None:
            return turned(h, c, s)
        pieces, at, used = [], 0, 0
        for a, b in self.rows:
            n = (b - a) // self.group
            pieces += [h[..., at:a], turned(h[..., a:b], c[used : used + n], s[used : used + n])]
            at, used = b, used + n
        return torch.cat([*pieces, h[..., at:]], -1)

    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write the turn into the module's weight and bias: exact, up to one rounding."""
        weight = value_of(module, values, "weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows_first = out_first(module, weight)
        W = self(weight.to(wide).t() if rows_first else weight.to(wide))
        values["weight"] = (W.t() if rows_first else W).to(weight.dtype)
        if (bias := values.get("bias", module.bias)) is not None:
            values["bias"] = self(bias.detach().to(wide)).to(bias.dtype)


def turned(h: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """y of h (..., channels) with c, s (groups, 2, group / 2): in the wider precision of all three,
    rounded once to h's."""
    if has_torch_function((h, c, s)):                    # a tape that watches notes how y is made
        y = handle_torch_function(turned, (h, c, s), h, c, s)
    elif compiling() or transformed():
        a, b = h.unflatten(-1, c.shape).unbind(-2)
        y = torch.stack([a * c[:, 0] - b * s[:, 0], b * c[:, 1] + a * s[:, 1]], -2)
        y = y.flatten(-3).to(h.dtype)
    else:
        y = applied(_Turned, h, c, s)
    return y                                             # type: ignore[no-any-return]


class _Turned(torch.autograd.Function):
    """By strips of tokens, so that what is made on the way stays in the cache; keeps h alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, c: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(h, c, s)
        return _in_strips(h, c, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, c, s = ctx.saved_tensors
        need_h, *need = ctx.needs_input_grad
        # the other way round: the transpose of every plane's matrix
        dh = _in_strips(g, c, -s.flip(1)) if need_h else None
        if not any(need):
            return dh, None, None
        dc, ds = torch.zeros_like(c), torch.zeros_like(s)
        h, g = h.reshape(-1, *c.shape), g.reshape(-1, *c.shape)
        for i, j in _strips(h):
            p, q = (t[i:j].to(c.dtype) for t in (g, h))
            dc += (p * q).sum(0)
            ds[:, 0] -= (p[:, :, 0] * q[:, :, 1]).sum(0)
            ds[:, 1] += (p[:, :, 1] * q[:, :, 0]).sum(0)
        return dh, dc, ds


def _in_strips(h: Tensor, c: Tensor, s: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, c.dtype)
    rows = h.reshape(-1, *c.shape)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for i, j in _strips(rows):
        part = rows[i:j].to(wide)
        made = torch.mul(part, c, out=y[i:j]) if y.dtype == wide else part * c
        made[:, :, 0].addcmul_(part[:, :, 1], s[:, 0], value=-1)
        made[:, :, 1].addcmul_(part[:, :, 0], s[:, 1])
        if y.dtype != wide:
            y[i:j] = made
    return shaped(y, h.shape)


def _strips(rows: Tensor) -> Iterator[tuple[int, int]]:
    n, width = len(rows), rows[0].numel() if len(rows) else 1
    step = max(1, STRIP // width) if rows.device.type == "cpu" else max(1, n)
    for i in range(0, n, step):
        yield i, min(n, i + step)
