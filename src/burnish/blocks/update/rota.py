"""Whose turn it is: a share of the matrices of a model has moments, another one every period."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from .noise import fold

Order = Literal["random", "ascending", "descending", "mirror"]


@dataclass(frozen=True)
class Rota:
    """Of `names`, in the model's order, round(density len(names)) are live in every turn.

    order: "random" draws them anew each turn; the others take the next ones, round and round:
    from the first, from the last, or from both ends by turns (first, last, second, ...).
    The answer depends on (seed, turn) alone: the same on every rank, and after a resume.
    """

    density: float
    order: Order
    names: Sequence[str] = ()

    def among(self, named: Iterable[tuple[str, Tensor]], covers: Callable[[str, Tensor], bool]
              ) -> Rota:
        """With the names of those that are covered; a tensor that has several has its first."""
        names: dict[int, str] = {}
        for name, p in named:
            if covers(name, p):
                names.setdefault(id(p), name)
        return replace(self, names=tuple(names.values()))

    def live(self, turn: int, seed: int) -> frozenset[str]:
        total, count = len(self.names), round(self.density * len(self.names))
        names = list(self.names)
        if self.order == "random":
            return frozenset(random.Random(fold("rota", seed, turn)).sample(names, count))
        if self.order == "descending":
            names.reverse()
        elif self.order == "mirror":
            names = [names[-1 - i // 2 if i % 2 else i // 2] for i in range(total)]
        return frozenset(names[(turn * count + i) % total] for i in range(count))
