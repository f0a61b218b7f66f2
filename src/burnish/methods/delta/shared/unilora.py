from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.banked import Assigned, Dealt
from ....blocks.weight.shared import Seeded
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Unilora(Method):
    """Uni-LoRA: all factors of all matrices are one vector, dealt out.

    ``W' = W + B A``, A (rank, in), B (out, rank). The D = rank sum(in + out) entries of all of them
    together are ``P theta``: theta (dimension,) trains; a row of P has one entry that is not zero,
    at random, and ``P^T P = I``: an entry is ``theta_j / sqrt(n_j)``, n_j how many are theta_j.
    Every number is dealt as often as any other, or once more; `seed` draws the order, over the
    matrices in the model's order (so another set of targets is another deal).

    Start: theta uniform in +-`start`: step 0 is *not* the pre-trained function, but nearly. Trains
    `dimension` numbers, whatever the model. The deal is D whole numbers of four bytes once, never
    in files, and is drawn again by numpy's generator as PEFT does. Kept for backward: x, rank per
    token; the factors are gathered again there. Merges exactly, and exports as plain LoRA too. No
    weight decay, which would pull one number at thousands of places.
    """

    paper: ClassVar[str] = "Uni-LoRA: One Vector is All You Need (2025), arXiv:2506.00799"
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, float]] = {"dimension": 40, "start": 0.2}

    rank: int = setting(4, "rank of the updates", alias=("r",))
    dimension: int = setting(256, "numbers that all matrices are made of",
                             alias=("theta_d_length",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("unilora_dropout",))
    start: float = setting(0.02, "bound of theta's uniform start", alias=("init_theta_d_bound",))
    seed: int = setting(42, "of the deal", alias=("proj_seed",))

    def __post_init__(self) -> None:
        check_dropout("unilora", self.dropout)
        if self.rank < 1 or self.dimension < 1 or self.seed < 0:
            raise RecipeError("unilora: rank and dimension of at least 1, seed of at least 0 are "
                              "expected")
        if self.start <= 0:
            raise RecipeError(f"unilora: start={self.start}: at 0 no factor would ever move")

    def repeats(self) -> int | None:
        return None                              # no two matrices are dealt alike

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor | Seeded]:
        n = self.rank * sum(p.out + p.inp for p in places)
        if self.dimension > n:
            raise RecipeError(f"unilora: dimension={self.dimension} is more than the {n} entries "
                              "of all factors")
        theta = nn.Parameter(torch.empty(self.dimension).uniform_(-self.start, self.start))
        theta.burnish_decay = False                       # type: ignore[attr-defined]
        deal = {"n": n, "numbers": self.dimension, "seed": self.seed}
        return {"theta": theta, "index": Dealt((n,), **deal),
                "often": Dealt((self.dimension,), counted=True, **deal)}

    def delta(self, site: Site) -> Assigned:
        place = site.place
        place.check_rank(self.rank, "unilora")
        before = site.places[: list(site.places).index(place)]
        term = Assigned(place, self.rank, site.shared,
                        self.rank * sum(p.out + p.inp for p in before))
        term.dropout = self.dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone: none, theta is the recipe's."""
        return 0
