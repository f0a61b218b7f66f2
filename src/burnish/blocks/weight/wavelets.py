"""Updates that are a few coefficients of a wavelet transform over the matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns import Columns
from .filters import LOW

PLAIN = "none"
FAMILIES = (*LOW, PLAIN)


def high(low: tuple[float, ...]) -> list[float]:
    """The high-pass filter beside a low-pass one: ``g_j = (-1)^j h_(L-1-j)``."""
    return [(-1) ** j * h for j, h in enumerate(reversed(low))]


def bands(d: int, length: int) -> int:
    """How many numbers either half of a transform of d features has, for filters of a length."""
    return -(-(d + length - 2) // 2)


class Wavelets(Columns):
    """``Delta = s sum_k c_k p_k q_k^T``: p_k and q_k are what a transform of one level is made of.

    With filters h, g of length L and m = bands(d, L) places of a half, one is, of d features,
    ``h[i + L - 2 - 2 t]`` or ``g[...]`` at feature i, for t < m: nothing but L numbers. Of the grid
    (2 m_out, 2 m_in) with the low places of either side first, the coefficient at (u, v) has
    t = u mod m_out and g in p where *v* is a high one, t = v mod m_in and g in q where *u* is (as
    PEFT's transform has it). Positions are those of the matrix, laid in the middle of that grid.
    family "none": the entries themselves.

    index (n,): flat positions ``o in + i`` of the matrix. std: of the coefficients at the start.
    Columns: taps of q_k gathered by p's places, and one convolution along the outputs.
    """

    def __init__(self, out: int, inp: int, index: Tensor, scale: float, family: str,
                 std: float):
        super().__init__()
        self.out, self.inp, self.scale = out, inp, scale
        self.c = nn.Parameter(torch.randn(index.numel()) * std)
        self.c.burnish_decay = False                     # type: ignore[attr-defined]
        self.register_buffer("index", index, persistent=False)
        low = LOW.get(family, ())
        self.taps = (*low, *high(low))           # as exact as whatever they meet

    def columns(self, i0: int, i1: int) -> Tensor:
        o, i = self.index // self.inp, self.index % self.inp
        width = i1 - i0
        if not self.taps:
            return self._spread(self.c, o, i - i0, self.out, width) * self.scale
        taps = self.c.new_tensor(self.taps).view(2, -1)
        length = taps.shape[1]
        m_o, m_i = bands(self.out, length), bands(self.inp, length)
        u, v = o + (2 * m_o - self.out) // 2, i + (2 * m_i - self.inp) // 2
        q = self.c[:, None] * taps[(u >= m_o).long()]                        # (n, L)
        at = 2 * (v % m_i)[:, None] + torch.arange(length, device=u.device) - (length - 2) - i0
        row = ((v >= m_i) * m_o + u % m_o)[:, None].expand_as(at)
        grid = self._spread(q.flatten(), row.flatten(), at.flatten(), 2 * m_o, width)
        whole = F.conv_transpose2d(grid.view(1, 2, m_o, width), taps[:, None, :, None],
                                   stride=(2, 1))[0, 0]
        return whole[length - 2 : length - 2 + self.out] * self.scale

    @staticmethod
    def _spread(values: Tensor, row: Tensor, column: Tensor, rows: int, width: int) -> Tensor:
        """Values put at places of a (rows, width) matrix, those outside its columns left out."""
        inside = (column >= 0) & (column < width)
        return values.new_zeros(rows * width).index_add(
            0, (row * width + column) * inside, values * inside).view(rows, width)
