"""Low-rank updates whose factors are put together from shards that many matrices share."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ...core.site import Place
from .paired import Paired


def table(rank: int, pieces: int, public: int, private: int, number: int, key: str) -> Tensor:
    """(rank * pieces,) shards that make up the rows of a factor, a row's pieces side by side.

    Of rank - private rows the pieces are drawn from the `public` first shards, none of them twice;
    the last `private` rows are the `number`-th matrix's own shards, which come behind. key: what
    is drawn depends on it alone, the same on every machine.
    """
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    drawn = torch.randperm(public, generator=g, device="cpu")[: (rank - private) * pieces]
    own = torch.arange(private * pieces) + public + number * private * pieces
    return torch.cat([drawn, own])


class OfShared(Paired):
    """``Delta = B A`` of factors that are made of what the recipe owns and many matrices read.

    Subclasses give :meth:`pair`. shared: whose attributes `names` train. Backward keeps x and makes
    the factors again.
    """

    def __init__(self, place: Place, shared: Any, names: tuple[str, ...]):
        super().__init__()
        self.out, self.inp, self.names = place.out, place.inp, names
        self.__dict__["shared"] = shared               # the root owns it

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self.shared, n) for n in self.names)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), differentiable."""
        raise NotImplementedError


class Pooled(OfShared):
    """``Delta = s B A``: rows of A (r, in) and columns of B (out, r) are shards of two pools.

    pools: whose attributes `names` are the pools (shards, in / pieces) and (shards, out / pieces).
    a, b: the shards of each factor (see :func:`table`).
    """

    def __init__(self, place: Place, scale: float, a: Tensor, b: Tensor, pools: Any,
                 names: tuple[str, str]):
        super().__init__(place, pools, names)
        self.scale = scale
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        pool_a, pool_b = self.borrowed
        A = pool_a.index_select(0, self.a).view(-1, self.inp)
        B = pool_b.index_select(0, self.b).view(-1, self.out).t()
        return A, B * self.scale
