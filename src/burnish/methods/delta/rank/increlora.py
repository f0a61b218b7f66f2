from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ....blocks.choose.ranks import Rising
from ....blocks.update.objective import OnWeights
from ....blocks.weight.scored import Scored
from ....blocks.weight.triplets import WAITING, Triplets, crooked
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


class Growing(Scored, Triplets):
    """``Delta = s P diag(E, 1e-5 ...) Q``, s = alpha / (rank + 1e-5), which gains components."""

    def __init__(self, place: Place, rank: int, waiting: int, alpha: float, preserve: bool):
        super().__init__(place, rank, 1.0, waiting)
        self.alpha, self.preserve = alpha, preserve

    #: it follows from the rank
    scale = property(lambda self: self.alpha / (self.rank + 1e-5), lambda self, value: None)

    def importance(self) -> Tensor | float:
        return self.score / (self.P.shape[0] * self.Q.shape[1]) ** 0.5

    def fresh(self, n: int, drawn: Any) -> dict[str, Tensor]:
        free = self.E.new_full((n,), WAITING if self.waiting else 0.0)
        return {"E": free, "P": drawn(self.P.shape[0], n), "Q": drawn(n, self.Q.shape[1])}

    def grown(self, n: int) -> None:
        if self.preserve:
            self.E.mul_(self.rank / (self.rank - n))

    def done(self) -> dict[str, Tensor] | None:
        stay = torch.arange(self.rank)
        return {"P": stay, "Q": stay} if self.waiting else None


@dataclass(frozen=True, kw_only=True)
class Increlora(Method):
    """IncreLoRA: every update starts at rank one; the matrices that matter grow.

    ``Delta = s P diag(E) Q``, s = alpha / (r + 1e-5) with r the present rank; P (out, r), E (r,),
    Q (r, in). Score of a matrix per update: ``S = sum |Delta * dL/dDelta| / sqrt(out in)``,
    smoothed to ``I' U`` as in AdaLoRA. After `warmup` updates, every `every` updates, the `top`
    matrices of the highest score gain `grow` components, until the ranks sum to rank x matrices.
    Advance learning: each matrix carries `grow` further components of P and Q that train with E
    held at 1e-5; growth sets their E free and brings new ones; at the end those that wait go.
    ``advance=False``: new components come with E = 0 instead. Objective: ``ortho * mean
    ||P^T P - I||_F`` over all P and Q.

    s falls as r grows, so growing shrinks the update by r / (r + grow), as the authors' code does;
    ``preserve=True`` raises E by the inverse, and growing changes nothing.

    Start: P, Q normal with std 0.02, E = 0; the function is the pre-trained one up to
    1e-5 alpha |p| |q| (exactly with ``advance=False``). Trains (r + waiting)(in + out) + r per
    matrix. Kept for backward: x and r + waiting numbers per token. Until growth ends scoring costs
    a full gradient's operations, never its size. Merges exactly. No decay, and no warm-up of the
    rate for new components, which the paper tells of (unconfirmed: its code).
    """

    paper: ClassVar[str] = ("IncreLoRA: Incremental Parameter Allocation Method for "
                            "Parameter-Efficient Fine-tuning (2023), arXiv:2308.12043")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "a_known_length_acts": "growth counts updates; tests/methods/test_increlora.py"}
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradient", "resize")
    small: ClassVar[dict[str, int]] = {"init_rank": 1, "warmup": 1, "every": 1, "top": 2}

    rank: int = setting(8, "rank per matrix on average at the end", alias=("target_r", "r"))
    init_rank: int = setting(1, "rank per matrix at the start", alias=("init_r",))
    grow: int = setting(1, "components a matrix gains at a time")
    top: int = setting(18, "matrices that grow at a time")
    warmup: int = setting(1000, "updates before the first growth")
    every: int = setting(1000, "updates between two growths")
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    ortho: float = setting(0.1, "weight of the orthogonality term", alias=("orth_reg_weight",))
    advance: bool = setting(True, "train components before they count")
    preserve: bool = setting(False, "growing leaves the function as it was")

    def __post_init__(self) -> None:
        if not 1 <= self.init_rank <= self.rank:
            raise RecipeError(f"increlora: init_rank {self.init_rank} must be between 1 and rank "
                              f"{self.rank}")
        if min(self.grow, self.top, self.every) < 1 or self.warmup < 0:
            raise RecipeError("increlora: grow, top, every >= 1 and warmup >= 0 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the budget of triplets",)

    def delta(self, site: Site) -> Growing:
        site.place.check_rank(self.init_rank, "increlora")
        waiting = self.grow if self.advance and not site.settled else 0
        return Growing(site.place, site.settled.get("rank", self.init_rank),
                       site.settled.get("waiting", waiting), self.alpha, self.preserve)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        yield from crooked([(t.P, t.Q) for _, t in tuned.terms(Growing)], self.ortho)

    def controller(self, tuned: Tuned) -> Rising:
        terms = dict(tuned.terms(Growing))
        return Rising(terms, tuned.resize, goal=self.rank * len(terms), grow=self.grow,
                      top=self.top, warmup=self.warmup, every=self.every, label="increlora")

    def per_token(self, place: Place, rank: int | None = None, waiting: int | None = None) -> int:
        """Numbers per token kept for backward besides the input."""
        own = self.grow if self.advance else 0
        return (rank or self.init_rank) + (own if waiting is None else waiting)

    def count(self, place: Place, rank: int | None = None, waiting: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank (default: at the start)."""
        every = self.per_token(place, rank, waiting)
        return every * (place.out + place.inp) + (rank or self.init_rank)
