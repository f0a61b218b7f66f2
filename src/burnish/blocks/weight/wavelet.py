"""Low-rank updates between the halves of a Haar transform of inputs and outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .path import Path

ROOT = math.sqrt(0.5)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbouring features over sqrt 2, (..., d) -> twice (..., ceil(d /
    2)): one level of the orthonormal Haar transform; an odd d is padded with a zero."""
    if x.shape[-1] % 2:
        x = nn.functional.pad(x, (0, 1))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (a + b) * ROOT, (a - b) * ROOT


def joined(low: Tensor, high: Tensor, d: int) -> Tensor:
    """What `halves` undoes; the first d features."""
    y = torch.stack([(low + high) * ROOT, (low - high) * ROOT], -1).flatten(-2)
    return y[..., :d]


class Wavelet(Path):
    """``Delta = s H_out^T M H_in``, H the one-level Haar transforms of features, low half first.

    shared: ``M = diag(B A, B A)``; else ``M = [[B_0 A_0, B_1 A_1], [B_2 A_2, B_3 A_3]]``, a block
    for every band of the two-dimensional transform of Delta (low outputs of low inputs first).
    A (bands, r, ceil(in / 2)) Kaiming-uniform, B (bands, ceil(out / 2), r) zero; no H is formed.
    """

    def __init__(self, out: int, inp: int, rank: int, scale: float, shared: bool):
        super().__init__()
        self.out, self.inp, self.scale, self.shared_map = out, inp, scale, shared
        bands, bound = 1 if shared else 4, 1 / math.sqrt(-(-inp // 2))
        self.A = nn.Parameter(torch.empty(bands, rank, -(-inp // 2)).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(bands, -(-out // 2), rank))
        for p in self.parameters():
            p.burnish_decay = False

    def path(self, h: Tensor) -> Tensor:
        low, high = halves(h)
        A, B = self.A.to(h.dtype), self.B.to(h.dtype)

        def band(x: Tensor, k: int) -> Tensor:
            return x @ A[k].t() @ B[k].t()

        if self.shared_map:
            made = band(low, 0), band(high, 0)
        else:
            made = band(low, 0) + band(high, 1), band(low, 2) + band(high, 3)
        return joined(*made, self.out) * self.scale
