"""Updates that are a sum of plane waves over the matrix: a few coefficients of its transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .columns import Columns


class Cosines(Columns):
    """``Delta[o, i] = s / (out in) sum_k c_k cos(2 pi (u_k o / out + v_k i / in))``.

    That is ``s Re IDFT2(F)`` with ``F[u_k, v_k] = c_k`` and zeros elsewhere. index (n,): the flat
    positions ``u_k in + v_k``. Columns: the sum over k is gathered by u, and one transform along
    the outputs does the rest, so a panel costs n numbers per column and log(out) per entry.
    """

    def __init__(self, out: int, inp: int, index: Tensor, scale: float, std: float):
        super().__init__()
        self.out, self.inp, self.scale = out, inp, scale
        self.c = nn.Parameter(torch.randn(index.numel()) * std)
        self.c.burnish_decay = False
        self.register_buffer("index", index, persistent=False)

    def columns(self, i0: int, i1: int) -> Tensor:
        u, v = self.index // self.inp, self.index % self.inp
        at = torch.arange(i0, i1, device=v.device)
        # whole turns are taken off as integers: angles stay small, and exact
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        angle = ((v[:, None] * at) % self.inp).to(c.dtype) * (2 * math.pi / self.inp)
        waves = torch.polar(torch.ones_like(angle), angle) * c[:, None]
        F = waves.new_zeros(self.out, i1 - i0).index_add(0, u, waves)
        return torch.fft.ifft(F, dim=0).real * (self.scale / self.inp)
