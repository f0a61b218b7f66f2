from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....blocks.choose import masks
from ....blocks.choose.largest import LargestOfBatches
from ....blocks.weight.factor import Chain
from ....blocks.weight.sparse import SparseDelta
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Spt(Method):
    """SPT-LoRA: where many entries of a matrix are sensitive a LoRA, elsewhere these entries alone.

    The sensitivity of an entry is the loss that one gradient step on it takes away to first order:
    the sum of g^2 over calibration batches, ``tune(..., calibration=batches)``. Of the most
    sensitive entries over all targets a matrix has c; a LoRA costs P = rank (in + out):
    ``y = x W^T + scale (x A^T) B^T`` if c >= P / ease, else ``W + scatter(index, v)`` on those c.
    How many count as most sensitive is what brings the cost, P or c summed, nearest to `budget`.

    Start: B = 0 and v = 0, the pre-trained function exactly. Trains as near to `budget` as the
    steps of P allow. Kept for backward: x, and rank numbers per token beside a LoRA. Merges
    exactly. While data is read the host holds a round of squares; of each matrix at most P / ease
    candidates go on. The file holds plan and index: a load needs no data. Without data (a
    simulation) every matrix has a LoRA.

    Departures: gradients are read in evaluation mode; vectors (biases, norms) are no candidates
    (there: one trains whole with a fifth of its entries): set bitfit beside it; every number of
    entries is tried, not steps of 20,000; a LoRA, never an adapter. (The authors' sparse linear
    keeps a copy of its weight and makes gradients of k entries as the diagonal of a k x k product.)
    """

    paper: ClassVar[str] = "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, ICCV 2023"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    by_data: ClassVar[bool] = True
    small: ClassVar[dict[str, float]] = {"budget": 1500, "rank": 2}

    budget: int = setting(400_000, "trained parameters to come near")
    rank: int = setting(8, "rank of a LoRA", alias=("r",))
    ease: float = setting(10.0, "alpha: a matrix with P / ease sensitive entries gets a LoRA",
                          other=(1.5,))
    scale: float = setting(1.0, "of a LoRA")
    samples: int = setting(256, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if self.budget < 1 or self.ease < 1 or self.samples < 1:
            raise RecipeError("spt: budget, ease and samples are at least 1, got "
                              f"{self.budget}, {self.ease} and {self.samples}")

    def observe(self, place: Place) -> LargestOfBatches:
        place.check_rank(self.rank, "spt")
        return LargestOfBatches(place.out, place.inp)

    def reach(self, place: Place) -> int:
        """How many sensitive entries bring a matrix a LoRA."""
        return ceil(self.rank * (place.out + place.inp) / self.ease)

    def steps(self, place: Place) -> list[int]:
        """What each further sensitive entry of a matrix costs."""
        few = self.reach(place) - 1
        whole = [1] * few + [self.rank * (place.out + place.inp) - few]
        return whole[: place.numel]

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        costs = [self.steps(p) for p in seen]
        for s, c in zip(seen.values(), costs, strict=True):
            s.condense(len(c))
        chosen = nearest([s.scores for s in seen.values()], costs, self.budget)
        return {p: {"rank": self.rank} if n >= self.reach(p) else {"entries": n}
                for p, n in zip(seen, chosen, strict=True)}

    def delta(self, site: Site) -> Chain | SparseDelta | None:
        place, entries = site.place, site.settled.get("entries")
        place.check_rank(self.rank, "spt")
        if entries is None:
            return Chain(place, self.rank, self.scale)
        index = masks.to_come(place, entries) if site.seen is None else site.seen.index[:entries]
        return SparseDelta(place, index.to(site.weight.device), portable=False, narrow=False) \
            if entries else None

    def per_token(self, place: Place, rank: int | None = None, entries: int | None = None) -> int:
        """Numbers kept per token besides the input."""
        return self.rank if entries is None else 0

    def count(self, place: Place, rank: int | None = None, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; without data: of a LoRA."""
        return self.rank * (place.out + place.inp) if entries is None else entries


def nearest(scores: list[Tensor], costs: list[list[int]], budget: int) -> list[int]:
    """How many entries of each list count, where the largest of all do until the sum of their costs
    is nearest to the budget. Scores fall in each list."""
    of = torch.cat([torch.full((len(s),), k) for k, s in enumerate(scores)])
    price = torch.tensor([p for s, c in zip(scores, costs, strict=True) for p in c[: len(s)]])
    order = torch.cat(scores).argsort(descending=True, stable=True)
    n = int((price[order].cumsum(0) - budget).abs().argmin()) + 1
    return torch.bincount(of[order[:n]], minlength=len(scores)).tolist()
