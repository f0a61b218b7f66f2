"""Updates that are a few entries of a two-dimensional cosine transform, whose places train too."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .columns import Columns


class Located(Columns):
    """``Delta = s C^T S D``: C (out, out), D (in, in) orthonormal DCT-II, S zero but for
    ``S[u_k, v_k] += a_k``; two entries at one place add up.

    a (n,) is zero at the start. at (2, n), the u over the v, are numbers that forward rounds. Their
    gradient, where it is wanted, is a central difference over the neighbouring places, the other
    coordinate fixed (one-sided at a border): ``dL/du_k = s a_k (T[u+1, v] - T[u-1, v]) / 2`` with T
    the transform of dL/dDelta. Columns: n waves along the inputs gathered by u, and one transform
    along the outputs.
    """

    def __init__(self, out: int, inp: int, index: Tensor, scale: float):
        super().__init__()
        self.out, self.inp, self.scale = out, inp, scale
        self.a = nn.Parameter(torch.zeros(index.numel()))
        self.at = nn.Parameter(torch.stack([index // inp, index % inp]).to(self.a.dtype))
        for p in self.parameters():
            p.burnish_decay = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Located:
        """Places stay in fp32: beyond 256, half precision has no odd numbers."""
        at = self.at.detach()
        super()._apply(fn, recurse)
        if self.at.dtype != torch.promote_types(self.at.dtype, torch.float32):
            self.at.data, self.at.grad = at.to(self.at.device), None
        return self

    def places(self) -> tuple[Tensor, Tensor]:
        """(u, v): whole numbers within the matrix."""
        u, v = self.at.detach().round().long()
        return u.clamp(0, self.out - 1), v.clamp(0, self.inp - 1)

    @property
    def met(self) -> int:
        """How many coefficients stand where an earlier one does."""
        u, v = self.places()
        return u.numel() - (u * self.inp + v).unique().numel()

    @torch.no_grad()
    def confine(self) -> None:
        """Bring numbers that have left the matrix back to its border."""
        self.at[0].clamp_(0, self.out - 1)
        self.at[1].clamp_(0, self.inp - 1)

    def _waves(self, v: Tensor, i0: int, i1: int) -> Tensor:
        """Rows v of D, columns i0:i1."""
        odd = 2 * torch.arange(i0, i1, device=v.device) + 1
        # whole turns are taken off as integers: angles stay small, and exact
        angle = ((v[:, None] * odd) % (4 * self.inp)).to(
            torch.promote_types(self.a.dtype, torch.float32))
        size = angle.new_full(v.shape, math.sqrt(2 / self.inp)).masked_fill(
            v == 0, math.sqrt(1 / self.inp))
        return (angle * (math.pi / (2 * self.inp))).cos() * size[:, None]

    def columns(self, i0: int, i1: int) -> Tensor:
        u, v = self.places()
        waves, moves = self._waves(v, i0, i1), torch.is_grad_enabled() and self.at.requires_grad
        if moves:                                # of value nothing; its slope is the difference
            du, dv = self.at - self.at.detach()
            above, below, gap = _beside(v, self.inp)
            step = self._waves(above, i0, i1) - self._waves(below, i0, i1)
            waves = waves + (dv / gap)[:, None] * step
        waves = waves * self.a[:, None]
        F = waves.new_zeros(self.out, i1 - i0).index_add(0, u, waves)
        if moves:
            above, below, gap = _beside(u, self.out)
            part = waves * (du / gap)[:, None]
            F = F.index_add(0, above, part).index_add(0, below, part, alpha=-1)
        return _back(F) * self.scale


def _beside(k: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The places on both sides of k, and how far apart they are."""
    above, below = (k + 1).clamp(max=size - 1), (k - 1).clamp(min=0)
    return above, below, (above - below).clamp(min=1)


def _back(F: Tensor) -> Tensor:
    """``C^T F``, C the orthonormal DCT-II of F's rows, by one real transform of twice the length:
    ``sum_k c_k F_k cos(pi (2 o + 1) k / 2 N)`` is the first half of it."""
    N = F.shape[0]
    k = torch.arange(N, device=F.device, dtype=F.dtype)
    size = torch.full_like(k, math.sqrt(0.5 / N)).masked_fill(k == 0, math.sqrt(1 / N))
    turn = torch.polar(size, k * (math.pi / (2 * N)))
    return torch.fft.irfft(F * turn[:, None], n=2 * N, dim=0, norm="forward")[:N]
