"""What the singular values of an update tell: how many directions it has, and which are new.

    effective rank   exp(-sum p_i log p_i), p_i = s_i / sum s: n for n equal directions
    stable rank      sum s_i^2 / s_1^2
    energy rank      how many values hold a share of sum s_i^2

Intruder dimensions: of the leading left singular vectors u_j of a tuned weight W1 those that look
like none of the base's, ``c_j = max_i |<u_j, u0_i>| < threshold`` over all of the base's u0_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import svd

#: roundings of the largest value within which values of a base have one space, not vectors of their
#: own: what a decomposition makes of them there is chance
TIES = 32


def pair_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of ``B A`` (falling), A (r, in), B (out, r), in O((in + out) r^2)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    RB, RA = torch.linalg.qr(B.to(wide)).R, torch.linalg.qr(A.t().to(wide)).R
    return torch.linalg.svdvals(RB @ RA.t())


def values(delta: Tensor) -> Tensor:
    """Singular values of a matrix, falling."""
    return torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))


def effective_rank(s: Tensor) -> float:
    """0 for nothing."""
    total = float(s.sum())
    if not total > 0:
        return 0.0
    p = s.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def stable_rank(s: Tensor) -> float:
    """0 for nothing."""
    top = float(s.max()) if s.numel() else 0.0
    return float((s.double() / top).square().sum()) if top > 0 else 0.0


def energy_rank(s: Tensor, share: float = 0.9) -> int:
    """The fewest values that hold `share` of the sum of squares; 0 for nothing."""
    held = s.double().square().sort(descending=True).values.cumsum(0)
    if not held.numel() or not float(held[-1]) > 0:
        return 0
    return int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1


@dataclass(frozen=True)
class Leading:
    """The leading directions of a tuned weight beside those of its base.

    cosines (k,): c_j. s (k,), U (out, k), V (k, in): the leading singular triples of W1.
    """

    cosines: Tensor
    s: Tensor
    U: Tensor
    V: Tensor

    def intruders(self, threshold: float) -> Tensor:
        """Which of them look like nothing that the base has: (k,) of truth values."""
        return self.cosines < threshold

    def pair(self, threshold: float, keep: float) -> tuple[Tensor, Tensor]:
        """(A, B) with ``W1 + B A`` the weight whose intruders count `keep` times: 1 leaves it, 0
        takes them out. Stacked under an update of rank r it is one of rank r + intruders."""
        new = self.intruders(threshold)
        return self.V[new], (keep - 1) * self.s[new] * self.U[:, new]


@torch.no_grad()
def leading(base: Tensor, tuned: Tensor, k: int = 10, spaces: BaseSpaces | None = None) -> Leading:
    """The k leading directions of `tuned` and their cosines with all left singular vectors of
    `base`; both (out, in). spaces: the base's, where they are at hand (:class:`BaseSpaces`)."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    U, s, V = svd(tuned.to(wide), k)
    found = BaseSpaces.of(base) if spaces is None else spaces
    return Leading(found.cosines(U), s, U, V)


@dataclass(frozen=True)
class BaseSpaces:
    """All left singular vectors of a base weight, (out, m); values that tie share a space.

    Vectors of equal values are any basis of their space, so a direction is held against the
    space: ``c = max over spaces of |projection|``, which is ``|<u, u0_i>|`` where i stands alone.
    """

    U: Tensor
    space: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, base: Tensor) -> BaseSpaces:
        U, s, _ = torch.linalg.svd(base.to(torch.promote_types(base.dtype, torch.float32)),
                                   full_matrices=False)
        apart = s[:-1] - s[1:] > TIES * torch.finfo(s.dtype).eps * s[:1]
        return cls(U, torch.cat([s.new_zeros(1), apart.to(s).cumsum(0)]).long())

    def cosines(self, U: Tensor) -> Tensor:
        """The largest length of the projection of each column on a space: (k,)."""
        squares = (self.U.t().to(U) @ U).square()                       # (m, k)
        spaces = int(self.space[-1]) + 1
        return squares.new_zeros(spaces, U.shape[1]).index_add_(
            0, self.space.to(U.device), squares).amax(0).sqrt().clamp_(max=1.0)


def curve(cosines: Sequence[Tensor], steps: int = 20) -> list[tuple[float, int]]:
    """(threshold, intruders of all matrices together) for thresholds spread over (0, 1)."""
    flat = torch.cat([c.flatten().double().cpu() for c in cosines]) if cosines else torch.zeros(0)
    return [(i / steps, int((flat < i / steps).sum())) for i in range(1, steps)]
