from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.pooled import Pooled, table
from ....core.errors import RecipeError, TargetError
from ....core.method import Method, setting
from ....core.site import Place, Site


def kind(place: Place) -> str:
    """Matrices of one kind share their pools: those of one shape and, in blocks, of one role."""
    role = "" if place.block is None else place.role
    return re.sub(r"\W", "_", f"{role}_{place.out}x{place.inp}_")


@dataclass(frozen=True, kw_only=True)
class Mos(Method):
    """MoS: factors put together from shards of a pool that all layers share.

    ``W' = W + s B A``, A (rank, in), B (out, rank), s = alpha / rank. The L matrices of one shape
    and, in repeated blocks, of one role share two pools of n = budget L pieces shards, P_A (n, in /
    pieces) and P_B (n, out / pieces); a row of A is `pieces` shards of P_A side by side, a column
    of B as many of P_B. Which ones is a table drawn once from `seed` and the matrix's name, for A
    and B apart, no shard twice in a factor. `own_rows` rows of each factor are shards that no other
    matrix reads, aligned in A and B; they are part of the budget (how many the authors take is
    unconfirmed). No gate depends on tokens.

    Start: P_A uniform in +-1/sqrt(in), of the whole input (unconfirmed), P_B = 0: the pre-trained
    function exactly. Trains budget L (in + out) per kind, whatever the rank: what LoRA of rank
    `budget` trains. Kept for backward: x, rank per token; the factors are gathered again there.
    Files hold the pools alone. Merges exactly, and exports as plain LoRA. No weight decay, which
    would fall on shards unevenly. With budget = own_rows = rank and pieces = 1 it is LoRA.
    """

    paper: ClassVar[str] = ("MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with "
                            "Mixture of Shards (2024), arXiv:2410.00938")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, Any]] = {"budget": 4, "pieces": 1}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    budget: int = setting(2, "parameters, as the rank of the LoRA that has as many", alias=("e",))
    pieces: int = setting(4, "shards of a row of A and of a column of B", alias=("l",), other=(2,))
    own_rows: int = setting(1, "rows of each factor that no other matrix reads", other=(0,),
                           alias=("private",))
    seed: int = setting(0, "of the tables")

    def __post_init__(self) -> None:
        if self.pieces < 1 or self.budget < 1:
            raise RecipeError("mos: budget and pieces of at least 1 are expected")
        if not 0 <= self.own_rows <= min(self.rank, self.budget):
            raise RecipeError(f"mos: own_rows={self.own_rows}: expected from 0 to the smaller of "
                              f"rank {self.rank} and budget {self.budget}")

    def repeats(self) -> int | None:
        return None

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        alike: dict[str, list[Place]] = {}
        for p in places:
            if self.rank <= min(p.out, p.inp):           # if not, `delta` says so
                alike.setdefault(kind(p), []).append(p)
        out: dict[str, Tensor] = {}
        for name, group in alike.items():
            p, shards = group[0], self.budget * len(group) * self.pieces
            if p.out % self.pieces or p.inp % self.pieces:
                raise TargetError(f"mos cuts rows and columns into {self.pieces} pieces, which "
                                  f"{p.name} ({p.out} x {p.inp}) has no whole number for: take "
                                  "other pieces, or leave it out of targets")
            most = self.own_rows + (self.budget - self.own_rows) * len(group)
            if self.rank > most:
                raise RecipeError(f"mos: rank {self.rank} needs more shards than there are for the "
                                  f"{len(group)} like {p.name}: with budget={self.budget} and "
                                  f"own_rows={self.own_rows} the largest rank there is {most}")
            first = torch.empty(shards, p.inp // self.pieces).uniform_(-p.inp**-0.5, p.inp**-0.5)
            out[f"{name}A"] = nn.Parameter(first)
            out[f"{name}B"] = nn.Parameter(torch.zeros(shards, p.out // self.pieces))
        for t in out.values():
            t.burnish_decay = False                       # type: ignore[attr-defined]
        return out

    def delta(self, site: Site) -> Pooled:
        site.place.check_rank(self.rank, "mos")
        name, place = kind(site.place), site.place
        alike = [p for p in site.places if kind(p) == name]
        public = (self.budget - self.own_rows) * len(alike) * self.pieces
        a, b = (table(self.rank, self.pieces, public, self.own_rows, alike.index(place),
                      f"{self.seed}/{place.name}/{side}") for side in "AB")
        return Pooled(place, self.alpha / self.rank, a, b, site.shared,
                      (f"{name}A", f"{name}B"))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone: none, the pools are the recipe's."""
        return 0
