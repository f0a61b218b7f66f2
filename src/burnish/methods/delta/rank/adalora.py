from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ....blocks.choose.ranks import Falling, Shrinking
from ....blocks.update.objective import OnWeights
from ....blocks.weight.triplets import Triplets, crooked
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


def triplet_score(P: Tensor, E: Tensor, Q: Tensor) -> Tensor:
    """``S_i = s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij)``; P (out, r), E (r,), Q (r, in)."""
    return E + P.mean(0) + Q.mean(1)


@torch.no_grad()
def rest(term: Triplets, alive: Tensor) -> None:
    """Triplets that are not among the best have E = 0 for now."""
    term.E.mul_(alive.to(term.E.dtype))


@dataclass(frozen=True, kw_only=True)
class Adalora(Method):
    """AdaLoRA: an update in singular-value form whose values compete for a shrinking budget.

    ``Delta = s P diag(E) Q``, P (out, r0), E (r0,), Q (r0, in), s = alpha / (r0 + 1e-5), r0 =
    `init_rank`. Objective: ``ortho * mean ||P^T P - I||_F`` over all P and Q (the authors' code;
    the paper sums squares). Scores after every update: ``I = |w dw|`` smoothed as ``I' U``;
    triplet i: ``S_i = s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij)``. Budget: r0 per matrix until
    `warmup`, then cubically down to `rank` at 1 - `cooldown` (as the code; the paper prints one
    `cooldown` too many, with which b would not begin at r0); every `every` updates the triplets
    that are not among the b(t) best of the whole model get E = 0 and may revive. At 1 - `cooldown`
    (at the latest after the last update) those that are not among the rank x matrices best go for
    good: tensors, moments and file shrink, and the objective sees what is left. (The authors'
    code keeps them at E = 0.)

    Start: P, Q normal with std 0.02, E = 0: the pre-trained function exactly. Trains
    r0 (in + out + 1) per matrix. Kept for backward: x and r0 numbers per token (a mask of dropout
    is drawn again); scores hold two floats per parameter. Merges exactly. No weight decay. The
    number of steps must be known (``tuned.total_steps``, set by fit); without it the budget stays
    at r0.
    Ties at the threshold are broken by place, so exactly b(t) triplets live.
    """

    paper: ClassVar[str] = "Adaptive Budget Allocation for PEFT (2023), arXiv:2303.10512"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradient", "resize")

    rank: int = setting(8, "rank per matrix on average at the end", alias=("target_r", "r"))
    init_rank: int = setting(12, "rank per matrix at the start", alias=("init_r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    ortho: float = setting(0.1, "weight of the orthogonality term", alias=("orth_reg_weight",))
    warmup: float = setting(0.1, "share of training before pruning starts")
    cooldown: float = setting(0.3, "share of training after the pattern is fixed",
                              alias=("final",))
    dropout: float = setting(0.0, "dropout on the input of Q", alias=("lora_dropout",))
    every: int = setting(10, "updates between prunings", alias=("interval", "deltaT"))

    def __post_init__(self) -> None:
        check_dropout("adalora", self.dropout)
        if not 1 <= self.rank <= self.init_rank:
            raise RecipeError(f"adalora: rank {self.rank} must be between 1 and init_rank "
                              f"{self.init_rank}")
        if self.every < 1 or self.warmup < 0 or self.cooldown < 0 \
                or self.warmup + self.cooldown >= 1:
            raise RecipeError("adalora: every >= 1 and warmup + cooldown < 1 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the budget of triplets",)

    def delta(self, site: Site) -> Triplets:
        site.place.check_rank(self.init_rank, "adalora")
        rank = site.settled.get("rank", self.init_rank)
        term = Triplets(site.place, rank, self.alpha / (self.init_rank + 1e-5))
        term.dropout = self.dropout
        return term

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        yield from crooked([(t.P, t.Q) for _, t in tuned.terms(Triplets)], self.ortho)

    def controller(self, tuned: Tuned) -> Shrinking:
        return Shrinking(dict(tuned.terms(Triplets)), tuned.resize,
                         Falling(self.init_rank, self.rank, self.warmup, self.cooldown),
                         self.every, triplet_score, rest)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.init_rank

    def count(self, place: Place, rank: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank (default: before pruning)."""
        return (self.init_rank if rank is None else rank) * (place.out + place.inp + 1)
