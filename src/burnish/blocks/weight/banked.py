"""Low-rank updates made of one bank that all matrices read: its vectors mixed, or its numbers
dealt out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...core.site import Place
from .pooled import OfShared
from .shared import Seeded


class Banked(OfShared):
    """Rows of A and columns of B in pieces, each a mixture of the few vectors that it likes best.

    ``piece = sum_t softmax(top-k of l)_t bank[t]``: l are a piece's logits, one for each vector of
    ``shared.bank`` (vectors, width); what is not among the k largest counts nothing and has no
    gradient. a (rank, in / width, vectors) are the logits of A, b (out / width, rank, vectors) of
    B, N(0, std^2) at the start.
    """

    def __init__(self, place: Place, rank: int, bank: Any, vectors: int, width: int, k: int,
                 std: float):
        super().__init__(place, bank, ("bank",))
        self.k = k
        self.a = nn.Parameter(torch.randn(rank, place.inp // width, vectors) * std)
        self.b = nn.Parameter(torch.randn(place.out // width, rank, vectors) * std)

    def mixed(self, logits: Tensor) -> Tensor:
        """(..., width) of logits (..., vectors)."""
        best, at = logits.topk(self.k)
        taken = self.shared.bank.index_select(0, at.flatten()).unflatten(0, at.shape)
        return torch.einsum("...k,...kw->...w", best.softmax(-1), taken.to(best.dtype))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.mixed(self.a).flatten(1), self.mixed(self.b).transpose(1, 2).flatten(0, 1)


def dealt(n: int, numbers: int, seed: int) -> np.ndarray[Any, Any]:
    """Which of the numbers each of n entries is: every one as often as any other, or once more,
    in an order that `seed` draws (numpy's generator, as PEFT has it)."""
    rng = np.random.default_rng(seed)
    each = np.repeat(np.arange(numbers), n // numbers)
    each = np.concatenate([each, rng.choice(numbers, size=n % numbers, replace=False)])
    rng.shuffle(each)
    return each


@dataclass(frozen=True, kw_only=True)
class Dealt(Seeded):
    """The table of :func:`dealt` for shape (n,) as whole numbers, or, `counted`, for shape
    (numbers,) how often each is dealt."""

    follows: ClassVar[bool] = False              # its seed is a setting
    n: int
    numbers: int
    seed: int
    counted: bool = False

    def draw(self, seed: int, name: str) -> Tensor:
        at = dealt(self.n, self.numbers, self.seed)
        told = np.bincount(at) if self.counted else at
        return torch.tensor(told.astype(np.int32), device="cpu")


class Assigned(OfShared):
    """All entries of A and B are numbers of one vector: ``theta[index] / sqrt(how often)``.

    shared: theta (numbers,), which trains, `index` and `often` as :class:`Dealt` makes them; the
    entries of A (rank, in) stand from `first` on in it, those of B (out, rank) behind.
    """

    def __init__(self, place: Place, rank: int, shared: Any, first: int):
        super().__init__(place, shared, ("theta",))
        self.rank, self.first = rank, first

    def at(self) -> tuple[Tensor, Tensor]:
        """Which number each entry of A and of B is."""
        own = self.shared.index[self.first : self.first + self.rank * (self.inp + self.out)]
        a, b = own.split([self.rank * self.inp, self.rank * self.out])
        return a.view(self.rank, self.inp), b.view(self.out, self.rank)

    def scales(self) -> Tensor:
        """What each number counts at a place of its: the projection keeps lengths."""
        return self.shared.often.to(self.shared.theta.dtype).rsqrt()

    def pair(self) -> tuple[Tensor, Tensor]:
        numbers = self.shared.theta * self.scales()
        a, b = (numbers.index_select(0, at.flatten()).view_as(at) for at in self.at())
        return a, b
