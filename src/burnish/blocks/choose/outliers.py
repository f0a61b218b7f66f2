"""How many outliers the weights of a block have, beside what passes them.

    A_ij = |W_ij| ||x_j||_2        an outlier: A_ij > times * the mean of A over its block

All matrices of a block compete together. A matrix keeps the norms of its inputs alone; its scores
exist while they are counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.site import Place
from .inputs import Norms
from .observe import Statistic, wide


class Weights(Norms):
    """The norms of a place's inputs beside its weight, which is only looked at."""

    condenses: ClassVar[bool] = True

    def __init__(self, width: int, name: str):
        super().__init__(width, "once")
        self.name = name                             # no two places have one weight
        self.W: Tensor | None = None

    @property
    def key(self) -> Hashable:
        return type(self), self.name

    def weigh(self, W: Tensor) -> None:
        self.W = W.detach()

    def scores(self) -> Tensor:
        """A (out, in)."""
        assert self.W is not None
        return wide(self.W).abs() * self.norm.to(self.W.device)


@torch.no_grad()
def outliers(seen: Mapping[Place, Statistic], times: float) -> dict[Place, dict[str, Any]]:
    """place -> how many outliers it has, of how many entries."""
    blocks: dict[int | None, list[tuple[Place, Weights]]] = {}
    for place, statistic in seen.items():
        if isinstance(statistic, Weights):
            blocks.setdefault(place.block, []).append((place, statistic))
    found: dict[Place, dict[str, Any]] = {}
    for inside in blocks.values():
        total = sum(float(s.scores().sum(dtype=torch.float64)) for _, s in inside)
        mean = total / sum(place.out * place.inp for place, _ in inside)
        for place, s in inside:
            found[place] = {"outliers": int((s.scores() > times * mean).sum()),
                            "entries": place.out * place.inp}
    return found
