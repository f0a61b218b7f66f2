"""Updates of convolution kernels by factors that have the kernel's sides among their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from .term import Term


class Flat(Term):
    """``Delta = s reshape(B A)``: the product's numbers, row by row, are those of the kernel
    (out, in / groups, ...). A (r, n) Kaiming-uniform, B (m, r) zero, m n numbers in all.
    """

    def __init__(self, place: Place, rows: int, columns: int, rank: int, scale: float):
        super().__init__()
        self.shape, self.scale = (place.out, place.inp), scale
        self.A = nn.Parameter(drawn(rank, columns))
        self.B = nn.Parameter(torch.zeros(rows, rank))
        for p in self.parameters():
            p.burnish_decay = False

    def dense(self) -> Tensor:
        return (self.B @ self.A).view(self.shape) * self.scale


class Polyadic(Term):
    """``Delta[o, i, u, v ..] = s sum_j a[o, j] b[j, i] c_1[j, u] c_2[j, v] ..``, over the axes
    (out, in / groups, kernel ...) (CP). a is zero, the others Kaiming-uniform.
    """

    cheap_tile = True

    def __init__(self, place: Place, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.zeros(place.out, rank))
        sizes = (place.inp // place.kernel, *place.axes)
        self.rest = nn.ParameterList(nn.Parameter(drawn(rank, n)) for n in sizes)
        for p in self.parameters():
            p.burnish_decay = False

    def right(self) -> Tensor:
        """All that is not a: (r, in)."""
        M, *sides = self.rest
        for c in sides:
            M = (M.unsqueeze(-1) * c.unsqueeze(1)).flatten(1)
        return M

    def panel(self, i0: int, i1: int) -> Tensor:
        return self.a @ self.right()[:, i0:i1] * self.scale

    def dense(self) -> Tensor:
        return self.a @ self.right() * self.scale

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        with torch.no_grad():
            return self.panel(i0, i1)


def drawn(rows: int, columns: int) -> Tensor:
    """Kaiming-uniform with a = sqrt 5, as a linear's weight: within 1 / sqrt(columns)."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5))
