from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.between import Between, Steered
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


def group(number: int, of: int, tying: float) -> int:
    """Which group of the matrices the `number`-th of so many is in: runs of one length, the last
    of which takes the rest. tying: 0, one each, to 1, one for all."""
    groups = max(1, round(of * (1 - tying)))
    return min(number // max(1, of // groups), groups - 1)


@dataclass(frozen=True, kw_only=True)
class Tinylora(Method):
    """TinyLoRA: a handful of numbers steer the principal directions of every weight.

    ``W = U S V^T``; ``W' = W + U_r S_r^(1/2) R S_r^(1/2) V_r^T`` of the `rank` leading triplets,
    ``R = sum_j v_j P_j``: v (dimension,) trains, P_j (rank, rank) are N(0, 1 / rank), drawn from
    `seed` plus the matrix's number among the targets. `tying` says how many matrices share a v, in
    the model's order: 0, none, to 1, all of them (13 numbers tune a model of billions that way).
    A matrix smaller than `rank` has the rank it can.

    Start: v = 0: the pre-trained function exactly; `start` above 0 draws v uniform in +-start,
    which is not. Trains `dimension` per group. The files hold v, and what no two machines make
    alike: both factors, rank (in + out) numbers, and P. Kept for backward: rank numbers per token,
    not x. Merges exactly, and exports as plain LoRA too. No weight decay.

    How P is distributed the paper leaves open: as PEFT has it.
    """

    paper: ClassVar[str] = "Learning to Reason in 13 Parameters (2026), arXiv:2602.04118"
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha", "embedding"})
    small: ClassVar[dict[str, int]] = {"dimension": 5}

    rank: int = setting(2, "leading triplets that are steered", alias=("r",))
    dimension: int = setting(64, "numbers of a group of matrices", alias=("u",))
    tying: float = setting(0.0, "how far matrices share them, from 0 to 1",
                           alias=("weight_tying",), other=(1.0,))
    dropout: float = setting(0.0, "dropout on the input", alias=("tinylora_dropout",))
    start: float = setting(0.0, "bound of a uniform start of v", alias=("init_v_bound",),
                           other=(0.5,))
    seed: int = setting(42, "of the P", alias=("projection_seed",))

    def __post_init__(self) -> None:
        check_dropout("tinylora", self.dropout)
        if self.rank < 1 or self.dimension < 1:
            raise RecipeError("tinylora: rank and dimension of at least 1 are expected")
        if not 0 <= self.tying <= 1:
            raise RecipeError(f"tinylora: tying={self.tying}: expected a share from 0 to 1")
        if self.start < 0:
            raise RecipeError(f"tinylora: start={self.start}: expected a bound, from 0")

    def repeats(self) -> int | None:
        return None                              # each matrix has P of its own

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        out: dict[str, Tensor] = {}
        for n in range(len(places)):
            name = f"v{group(n, len(places), self.tying)}"
            if name not in out:
                v = torch.empty(self.dimension).uniform_(-self.start, self.start)
                out[name] = nn.Parameter(v)
                out[name].burnish_decay = False           # type: ignore[attr-defined]
        return out

    def delta(self, site: Site) -> Between:
        place, number = site.place, list(site.places).index(site.place)
        r = min(self.rank, place.out, place.inp)
        g = torch.Generator().manual_seed(self.seed + number)
        P = torch.normal(0.0, r**-0.5, (self.dimension, r, r), generator=g, device="cpu")
        term = Steered(place.out, place.inp, P, site.shared,
                       f"v{group(number, len(site.places), self.tying)}")
        term.dropout = self.dropout
        return term.read(site, lambda W: torch.linalg.svd(W, full_matrices=False))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return min(self.rank, place.out, place.inp)

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone: none, the v are the recipe's."""
        return 0
