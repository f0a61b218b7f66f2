"""Whole columns or rows of a frozen matrix that train: dense slices, no index per entry.

``Delta[:, at] = V`` reads and keeps ``x[:, at]`` alone; ``Delta[at, :] = V`` needs all of x, but
of the gradient only ``g[:, at]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..matmul import mm
from .integer import Grid, codes, decoded
from .term import Term


class Slice(Term):
    """V (out, k) on the columns `at`, or (k, in) on the rows; `at` (k,), ascending and distinct.

    Zero at the start. counted: a file says how many there are, since nobody can compute it.
    """

    tokenwise = True
    #: of the layer's input, where what holds the weight says one: the codes are kept then
    grid: Grid | None = None

    def __init__(self, place: Place, at: Tensor, rows: bool = False):
        super().__init__()
        self.out, self.inp, self.rows = place.out, place.inp, rows
        self.register_buffer("at", at.sort().values.to(torch.int32))
        shape = (at.numel(), place.inp) if rows else (place.out, at.numel())
        self.V = nn.Parameter(torch.zeros(shape, device=at.device))
        self.counted = {"channels": at.numel()}

    def reads_on(self, grid: Grid | None) -> None:
        self.grid = grid

    @property
    def keeps_input(self) -> bool:
        return self.rows and self.V.requires_grad        # columns are kept by themselves

    def dense(self) -> Tensor:
        whole = self.V.new_zeros(self.out, self.inp)
        return whole.index_copy(0 if self.rows else 1, self.at.long(), self.V)

    def reads(self, need_x: bool) -> tuple[Tensor, ...]:
        return (*((self.V,) if need_x else ()), self.at)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        V = self.V.detach()
        if self.rows:
            made = mm(x_NI, V.t().to(x_NI.dtype))
            y_NO.index_add_(1, self.at, made.to(y_NO.dtype), alpha=scale)
            return ()
        x_NK = x_NI.index_select(1, self.at)
        y_NO.addmm_(x_NK.to(y_NO.dtype), V.t().to(y_NO.dtype), alpha=scale)
        return (codes(x_NK, self.grid) if self.V.requires_grad else None,)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        V, trains = self.V.detach().to(g_NO.dtype), self.V.requires_grad
        if self.rows:
            g_NK = g_NO.index_select(1, self.at)
            if dx_NI is not None:
                dx_NI.addmm_(g_NK.to(dx_NI.dtype), V.to(dx_NI.dtype), alpha=scale)
            dV = mm(g_NK.t(), x_NI.to(g_NK.dtype)) if trains and x_NI is not None else None
        else:
            if dx_NI is not None:
                dx_NI.index_add_(1, self.at, mm(g_NO, V).to(dx_NI.dtype), alpha=scale)
            dV = mm(g_NO.t(), decoded(kept[0], self.grid, g_NO.dtype)) if trains else None
        return [None if dV is None else dV.mul_(scale).to(self.V.dtype)]
