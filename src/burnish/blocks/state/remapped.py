"""Features through an MLP of their own width, kept like what they were and spread in directions.

    Z = W2 act(W1 F + b1) + b2
    R(F, Z) = mean_n ||F_n / ||F_n|| - Z_n / ||Z_n||||^2      they point where they pointed
            + (1 / D) sum_{i != j} C(Z)_ij^2                  their channels vary apart
            - s_1(Z) / sum_j s_j(Z)                           one direction leads

over the rows n that count: C the covariance of their channels, s the singular values of Z, through
the smaller Gram matrix in fp64, whose eigenvalues have a gradient also where they are equal. R
rides on the loss from where Z passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import current
from ..weight.experts import counted
from .bottleneck import activation

#: below which a singular value counts as this, as a share of the largest
FLOOR = 1e-8
#: what is nothing, among squares
TINY = 1e-24


def pointing(f: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Mean squared distance of rows of length one; w (n,) is 1 for rows that count, else 0."""
    each = (F.normalize(f, dim=-1) - F.normalize(z, dim=-1)).square().sum(-1)
    return (each * w).sum() / w.sum().clamp_min(1)


def covarying(z: Tensor, w: Tensor) -> Tensor:
    """``(1 / D) sum of squares of C off its diagonal``, 0 of a single row."""
    rows, w = w.sum(), w.unsqueeze(-1)
    z = (z - (z * w).sum(0) / rows.clamp_min(1)) * w
    C = z.t() @ z / (rows - 1).clamp_min(1)
    return (C.square().sum() - C.diagonal().square().sum()) / z.shape[1]


def leading(z: Tensor) -> Tensor:
    """``- s_1 / sum s_j``, from -1 to -1 / rank; 0 of rows that are all zero."""
    z = z if z.shape[0] <= z.shape[1] else z.t()
    wide = z.double()
    values = torch.linalg.eigvalsh(wide @ wide.t()).clamp_min(0)
    floor = (FLOOR**2 * values[-1]).detach() + TINY
    s = (values + floor).sqrt() - floor.sqrt()
    return (-s[-1] / s.sum().clamp_min(TINY)).to(z.dtype)


class Remapped(nn.Module):
    """Z of F (..., D); in training `weight` R rides on the loss."""

    def __init__(self, width: int, hidden: int, act: str, weight: float):
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act, self.weight = activation(act), weight

    def forward(self, f: Tensor) -> Tensor:
        z: Tensor = self.up(self.act(self.down(f.to(self.down.weight.dtype)))).to(f.dtype)
        here = current()
        riding = getattr(here.owner, "riding", None) if here is not None else None
        if riding is None or not riding.wanted or not self.weight:
            return z
        return riding.on(z, self.regulariser(f, z, counted(f)), self.weight)

    @staticmethod
    def regulariser(f: Tensor, z: Tensor, valid: Tensor | None = None) -> Tensor:
        """R, in fp32 at least. valid: mask (...) of the rows that count."""
        wide = torch.promote_types(z.dtype, torch.float32)
        f, z = f.to(wide), z.to(wide)
        w = f.new_ones(f.shape[:-1]) if valid is None or f.dim() == 2 else valid.to(wide)
        f, z, w = f.flatten(0, -2), z.flatten(0, -2), w.flatten()
        return pointing(f, z, w) + covarying(z, w) + leading(z * w.unsqueeze(-1))

    @staticmethod
    def count(width: int, hidden: int) -> int:
        """Trainable numbers."""
        return 2 * width * hidden + hidden + width
