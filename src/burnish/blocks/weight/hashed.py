"""Updates whose entries are numbers of one memory that all matrices share, found by a hash.

The entries of all matrices stand in one row, column by column, matrix after matrix: i of n. They
fall into partitions of M and these into chunks of Z that stay side by side in the memory psi (M,):

    stable   h(i) = Z ((c + s_p) mod C) + r       i = p M + Z c + r, C = M / Z
    roast    h(i) = Z (hash(chunk number) mod C) + r

s_p is hashed from the partition's number. In the first every number is read by n / M entries, or by
one more, and at M = n each by one.

    Delta_i = lam g(i) psi[h(i)] / d[h(i)],       d_j^2 = sum over i read at j of lam_i^2

lam is 1 / sqrt(in) of an entry's matrix, g(i) = +-1 a hash; d is 1 in the second. With d the map
from psi to all entries keeps lengths: plain descent on psi moves the entries as descent on them
would, projected on what psi can say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.site import Place
from .columns import Columns
from .shared import Seeded


def mixed(x: Any, seed: int) -> Any:
    """A whole number below 2^32 of each x (tensor of int64, or a number) and a seed."""
    x = (x + (seed * 0x9E3779B1 & 0xFFFFFFFF)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


@dataclass(frozen=True)
class Map:
    """Where entries are read: M numbers in chunks of `chunk`."""

    numbers: int
    chunk: int
    seed: int
    stable: bool = True

    @property
    def chunks(self) -> int:
        return self.numbers // self.chunk

    def shift(self, partition: Any) -> Any:
        """s_p."""
        return mixed(partition, self.seed + 1) % self.chunks

    def of(self, i: Tensor) -> Tensor:
        """h(i), of int64."""
        if not self.stable:
            return mixed(i // self.chunk, self.seed + 1) % self.chunks * self.chunk + i % self.chunk
        at = i + self.shift(i // self.numbers) * self.chunk
        return at % self.numbers

    def signs(self, i: Tensor, dtype: torch.dtype) -> Tensor:
        """g(i)."""
        return (mixed(i, self.seed) & 1).to(dtype).mul_(2).sub_(1)


@dataclass(frozen=True, kw_only=True)
class Lengths(Seeded):
    """``1 / d`` for shape (M,): of (entries, lam^2) of every matrix, in order."""

    follows: ClassVar[bool] = False              # nothing is drawn
    map: Map
    spans: tuple[tuple[int, float], ...]

    def draw(self, seed: int, name: str) -> Tensor:
        M, Z = self.map.numbers, self.map.chunk
        total, a, inside = torch.zeros(M, dtype=torch.float64, device="cpu"), 0, 0.0
        for size, square in self.spans:
            b = a + size
            first, last = a // M, (b - 1) // M
            inside += square * max(0, last - first - 1)      # whole partitions: every number once
            for p in dict.fromkeys((first, last)):
                lo, hi = max(a, p * M), min(b, (p + 1) * M)
                at = (lo + self.map.shift(p) * Z) % M
                rest = at + hi - lo - M
                total[at : at + hi - lo] += square
                if rest > 0:
                    total[:rest] += square
            a = b
        return (total + inside).rsqrt().float()


class Hashed(Columns):
    """See the module. shared: psi (M,), which trains, and `inverse`, 1 / d, or None.

    first: number of this matrix's first entry.
    """

    def __init__(self, place: Place, map: Map, first: int, shared: Any):
        super().__init__()
        self.out, self.inp, self.map, self.first = place.out, place.inp, map, first
        self.lam = place.inp**-0.5
        self.__dict__["shared"] = shared               # the root owns it

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return (self.shared.psi,)

    def columns(self, i0: int, i1: int) -> Tensor:
        psi = self.shared.psi
        i = torch.arange(self.first + i0 * self.out, self.first + i1 * self.out, device=psi.device)
        at = self.map.of(i)
        factor = self.map.signs(i, psi.dtype).mul_(self.lam)
        if self.map.stable:
            factor.mul_(self.shared.inverse.to(psi.dtype).index_select(0, at))
        return (psi.index_select(0, at) * factor).view(i1 - i0, self.out).t()
