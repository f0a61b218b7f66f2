"""Arithmetic on updates held as factors, ``Delta = s B A``: sums, truncation, averages.

A (R, I), B (O, R); convolutions flatten theirs, experts carry a leading axis. Everything costs
O((I + O) R^2); nothing of size O x I is formed but by :meth:`Factors.dense`, the reference.

A trained magnitude, bias, embedding row or whole module is no product of factors: these rules do
not apply to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import ConfigError


@dataclass(frozen=True)
class Factors:
    """``scale * B @ A``: A (..., rank, in), B (..., out, rank)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def dense(self) -> Tensor:
        """(..., out, in)."""
        return self.scale * (self.B @ self.A)

    def __mul__(self, factor: float) -> Factors:
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__


def cat(pairs: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """``sum_i w_i s_i B_i A_i`` exactly, by stacking: rank sum r_i, scale 1."""
    w = _weights(pairs, weights)
    A = torch.cat([(c * p.scale) * p.A for c, p in zip(w, pairs, strict=True)], -2)
    return Factors(A, torch.cat([p.B for p in pairs], -1))


def linear(pairs: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """``A = sum c_i A_i``, ``B = sum +-c_i B_i``, c_i = sqrt|w_i s_i|: same rank, cross terms.

    The result is sum_ij +-c_i c_j B_i A_j, not the sum of the updates: for soups of one run. A
    negative weight puts its sign on B. Raises ConfigError when ranks differ.
    """
    w = _weights(pairs, weights)
    if len({p.rank for p in pairs}) > 1:
        raise ConfigError(f"linear needs equal ranks, got {[p.rank for p in pairs]}; "
                          "use cat or svd")
    c = [math.sqrt(abs(x * p.scale)) for x, p in zip(w, pairs, strict=True)]
    signs = [math.copysign(1.0, x * p.scale) for x, p in zip(w, pairs, strict=True)]
    A = sum(k * p.A for k, p in zip(c, pairs, strict=True))
    B = sum(k * s * p.B for k, s, p in zip(c, signs, pairs, strict=True))
    return Factors(A, B)


def svd(pairs: Sequence[Factors], weights: Sequence[float] | None = None,
        rank: int | None = None) -> Factors:
    """The best rank-`rank` approximation of the weighted sum (default: the largest rank given)."""
    return truncate(cat(pairs, weights), rank or max(p.rank for p in pairs))


def truncate(pair: Factors, rank: int) -> Factors:
    """The best approximation of rank `rank`, scale 1, singular values shared by both factors.

    ``B = Q_B R_B``, ``A^T = Q_A R_A``, SVD of the small ``R_B R_A^T``. A rank that is not there
    (above in, out or the pair's own) is filled with zeros.
    """
    wide = torch.promote_types(pair.A.dtype, torch.float32)
    QB, RB = torch.linalg.qr((pair.scale * pair.B).to(wide))
    QA, RA = torch.linalg.qr(pair.A.to(wide).mT)
    U, S, Vt = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    r = min(rank, S.shape[-1])
    root = S[..., :r].sqrt()
    B = QB @ (U[..., :r] * root.unsqueeze(-2))
    A = (root.unsqueeze(-1) * Vt[..., :r, :]) @ QA.mT
    if r < rank:
        A = torch.nn.functional.pad(A, (0, 0, 0, rank - r))
        B = torch.nn.functional.pad(B, (0, rank - r))
    return Factors(A.to(pair.A.dtype), B.to(pair.B.dtype))


def inner(one: Factors, two: Factors) -> Tensor:
    """``<Delta_1, Delta_2>`` in O((in + out) R^2): trace((B_1^T B_2)(A_2 A_1^T))."""
    gram = (one.B.mT @ two.B) * (one.A @ two.A.mT)
    return one.scale * two.scale * gram.sum((-1, -2))


def merge(form: str, pairs: Sequence[Factors], weights: Sequence[float] | None = None,
          rank: int | None = None) -> Factors:
    """By name: "cat", "linear", "svd", or "auto": cat while the ranks add up to 128 or less."""
    if form == "auto":
        form = "cat" if sum(p.rank for p in pairs) <= 128 else "svd"
    if form == "svd":
        return svd(pairs, weights, rank)
    if form not in ("cat", "linear"):
        raise ConfigError(f"factors merge by 'cat', 'linear', 'svd' or 'auto', not {form!r}")
    return (cat if form == "cat" else linear)(pairs, weights)


def _weights(pairs: Sequence[Factors], weights: Sequence[float] | None) -> list[float]:
    if not pairs:
        raise ConfigError("there is nothing to merge")
    w = [1.0] * len(pairs) if weights is None else [float(x) for x in weights]
    if len(w) != len(pairs):
        raise ConfigError(f"{len(pairs)} adapters and {len(w)} weights")
    shapes = {(p.A.shape[-1], p.B.shape[-2]) for p in pairs}
    if len(shapes) > 1:
        raise ConfigError(f"updates of different matrices (in x out): {sorted(shapes)}")
    return w
