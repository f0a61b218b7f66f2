"""Two thin factors around a core that grows by rows and columns, in the shape of two triangles."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from .paired import Paired


def core_blocks(init: int, grow: int, rank: int) -> list[tuple[int, int]]:
    """(size, rank after it) of each block of a core of this rank."""
    return [(init, init), *((min(grow, rank - k), min(k + grow, rank))
                            for k in range(init, rank, grow))]


def core_size(init: int, grow: int, rank: int) -> int:
    """Numbers in one triangle."""
    return sum(n * now for n, now in core_blocks(init, grow, rank))


class Triangular(Paired):
    """``Delta = s B C A``, A (r, in), B (out, r), C (r, r) a lower and an upper triangle of blocks.

    Block i, of size a with r_i the rank after it, is a rows (a, r_i) of the lower and a columns
    (r_i, a) of the upper; the corner (a, a) they share has their sum. `lower` and `upper` hold the
    blocks one after another, row by row, columns as rows. s = alpha / (r + 1e-5).

    preserve: growing raises C by what s falls.
    """

    ranked: ClassVar[dict[str, int]] = {"A": 0, "B": 1, "lower": 0, "upper": 0}

    def __init__(self, place: Place, rank: int, init: int, grow: int, alpha: float,
                 preserve: bool):
        super().__init__()
        self.inp, self.init, self.grow, self.alpha = place.inp, init, grow, alpha
        self.preserve = preserve
        self.A = nn.Parameter(torch.randn(rank, place.inp) * 0.02)
        self.B = nn.Parameter(torch.randn(place.out, rank) * 0.02)
        size = core_size(init, grow, rank)
        self.lower, self.upper = (nn.Parameter(torch.zeros(size)) for _ in range(2))
        for p in self.parameters():
            p.burnish_decay = False                  # type: ignore[attr-defined]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def most(self) -> int:
        """The rank it can have."""
        return min(self.B.shape[0], self.inp)

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def settled(self) -> dict[str, int]:
        return {"rank": self.rank}

    def core(self) -> Tensor:
        """C."""
        blocks = core_blocks(self.init, self.grow, self.rank)
        low, up = (torch.cat([F.pad(part.view(n, now), (0, self.rank - now)) for part, (n, now)
                              in zip(flat.split([n * now for n, now in blocks]), blocks,
                                     strict=True)])
                   for flat in (self.lower, self.upper))
        return low + up.t()

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B @ self.core() * self.scale

    # -- growth -------------------------------------------------------------------------------
    def extent(self) -> Tensor:
        """``||C||_F`` over the number of its blocks."""
        blocks = core_blocks(self.init, self.grow, self.rank)
        return torch.linalg.matrix_norm(self.core()) / len(blocks)

    def fresh(self, n: int, drawn: Callable[..., Tensor]) -> dict[str, Tensor]:
        none = self.lower.new_zeros(n * (self.rank + n))
        return {"A": drawn(n, self.inp), "B": drawn(self.B.shape[0], n), "lower": none,
                "upper": none}

    @torch.no_grad()
    def grown(self, n: int) -> None:
        if self.preserve:
            for t in (self.lower, self.upper):
                t.mul_((self.rank + 1e-5) / (self.rank - n + 1e-5))
