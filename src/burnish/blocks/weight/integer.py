"""A layer in whole numbers of 8 bits: its weight, what it reads and what it gives.

    xb = clip(round(x / s_x) + z_x)                             read, each layer on its own grid
    a  = round(sum (xb - z_x) W + b / (s_x s_W))                 32-bit sums, s_W one per output
    yb = clip(round(e a) + z_y),  e = s_x s_W / s_y              given; clip: to [-128, 127]

Everything is computed in real units, ``x = s_x (xb - z_x)``, ``y = s_y (yb - z_y)``. A sum is
rounded to the grid of its products, which rounds the bias and takes floating-point noise away: the
numbers are those of the integers while |a| stays below what the precision holds whole (2^22 in
fp32). Backward goes straight through the rounding and is zero where something was clipped: one bit
a number is all it keeps.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.site import Place
from ..tape.functions import applied, transformed
from .pruned import packed, unpacked
from .quantise import Held, Quantiser

LOW, HIGH = -128, 127


class Grid(NamedTuple):
    """``scale (q - zero)``, q a whole number from LOW to HIGH."""

    scale: float
    zero: int


def grid_of(low: float, high: float) -> Grid:
    """The grid that spans low .. high, and zero, which lies on it."""
    if not (isfinite(low) and isfinite(high)):
        raise ConfigError(f"a grid spans numbers, and the data show {low} and {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (HIGH - LOW) or 1.0
    return Grid(scale, round(LOW - low / scale))


def codes(x: Tensor, grid: Grid | None) -> Tensor:
    """The whole numbers of an x that lies on a grid, a byte each; x where there is none."""
    if grid is None:
        return x
    return (x.to(torch.promote_types(x.dtype, torch.float32)) / grid.scale).round_().add_(
        grid.zero).to(torch.int8)


def decoded(q: Tensor, grid: Grid | None, dtype: torch.dtype) -> Tensor:
    """What :func:`codes` were of, in another precision."""
    if grid is None:
        return q.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return q.to(wide).sub_(grid.zero).mul_(grid.scale).to(dtype)


class Int8Provider(Held):
    """Holds a weight in whole numbers of 8 bits, one scale per output, and the grids on which its
    layer reads and gives. `weight` as the module stores it."""

    def __init__(self, weight: Tensor, place: Place, reads: Grid, gives: Grid):
        super().__init__()
        self.place, self.dtype, self.reads, self.written = place, weight.dtype, reads, gives
        codes, scale, _ = Quantiser(8).encode(place.view(weight))
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", place.unview(codes, weight))
        self.register_buffer("scale", scale.flatten())

    def weight(self) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        W = self.place.view(self.codes).to(wide).mul_(self.scale[:, None])
        return self.place.unview(W.to(self.dtype), self.codes)

    @property
    def grid(self) -> Grid:
        return self.reads

    def given(self, x: Tensor) -> Tensor:
        return on_grid(x, self.reads)

    def gives(self, y: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        step = self.scale.to(wide) * self.reads.scale
        return on_grid(y, self.written, step.view(-1, *(1,) * len(self.place.axes)))

    def extra_repr(self) -> str:
        return f"int8, {tuple(self.codes.shape)}, reads {self.reads}, gives {self.written}"


def on_grid(x: Tensor, grid: Grid, step: Tensor | None = None) -> Tensor:
    """x on the grid; `step`: rounded to whole steps of that size first."""
    if transformed():
        made, inside = _rounded(x.detach(), grid, step)
        return made + (x - x.detach()) * inside
    out: Tensor = applied(_OnGrid, x, grid, step)
    return out


def _rounded(x: Tensor, grid: Grid, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x on the grid, where it was not clipped)."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    q = x_wide / grid.scale if step is None else \
        (x_wide / step).round_().mul_(step / grid.scale)
    q = q.round_().add_(grid.zero)
    inside = (q >= LOW) & (q <= HIGH)
    return q.clamp_(LOW, HIGH).sub_(grid.zero).mul_(grid.scale).to(x.dtype), inside


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, step: Tensor | None) -> Tensor:
        made, inside = _rounded(x, grid, step)
        ctx.save_for_backward(packed(inside) if ctx.needs_input_grad[0] else None)
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return g.masked_fill(~unpacked(bits, g.shape), 0), None, None
