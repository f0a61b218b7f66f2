from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....blocks.choose.ranks import Widening
from ....blocks.update.objective import OnWeights
from ....blocks.weight.triangular import Triangular, core_size
from ....blocks.weight.triplets import crooked
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Triadaptlora(Method):
    """TriAdaptLoRA: a core of two triangles that grows where its norm does.

    ``Delta = s B C A``, A (r, in), B (out, r), C (r, r) = lower + upper, s = alpha / (r + 1e-5)
    with r the present rank. A growth of `grow` to the rank r_i adds as many rows (of length r_i)
    to the lower and columns to the upper triangle; the corner they share has their sum. Extent of a
    matrix: ``f = ||C||_F`` over the number of growths and the start, score ``f`` less that of the
    check before. Checks: every `every` updates from `warmup` on. With left = rank x matrices - sum
    of r and c = the share of the way from `warmup` to the end, the ``floor(c left)`` matrices of
    the highest score grow (``law="power"``: ``floor(left^c)``), one at least, until the ranks sum
    to rank x matrices. Objective: ``ortho * mean ||A A^T - I||_F`` over all A and B^T.

    New rows of A and B are normal with std 0.02, what joins C is zero; s falls as r grows, so
    growing shrinks the update by r / (r + grow), as published; ``preserve=True`` raises C by the
    inverse, and growing changes nothing. Scores cost no gradient and no state. A run with too few
    checks ends below the budget; without the number of updates nothing grows.

    Start: A, B normal with std 0.02, C = 0: the pre-trained function exactly (unconfirmed; the
    public code has B = C = 0, where every gradient is nothing). Trains r (in + out) + 2 sum grow
    r_i per matrix. Kept for backward: x, rank per token. Merges exactly. No decay.
    """

    paper: ClassVar[str] = ("TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation "
                            "for Parameter-Efficient Fine-Tuning (2025), arXiv:2501.08008")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("resize",)
    small: ClassVar[dict[str, Any]] = {"init_rank": 1, "every": 1, "warmup": 0.0}

    rank: int = setting(8, "rank per matrix on average at the end", alias=("target_r", "r"))
    init_rank: int = setting(1, "rank per matrix at the start", alias=("init_r",))
    grow: int | None = setting(None, "components a matrix gains at a time; None: half of rank",
                               other=(1,))
    law: Literal["linear", "power"] = setting("linear", "how many matrices grow at a check")
    warmup: float = setting(0.1, "share of the run before the first check")
    every: int = setting(100, "updates between two checks", alias=("incre_interval",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    ortho: float = setting(0.1, "weight of the orthogonality term", alias=("orth_reg_weight",))
    preserve: bool = setting(False, "growing leaves the function as it was")

    def __post_init__(self) -> None:
        if not 1 <= self.init_rank <= self.rank:
            raise RecipeError(f"triadaptlora: init_rank {self.init_rank} must be between 1 and "
                              f"rank {self.rank}")
        if self.step < 1 or self.every < 1 or not 0 <= self.warmup < 1:
            raise RecipeError("triadaptlora: grow, every >= 1 and a warmup in [0, 1) are expected")

    @property
    def step(self) -> int:
        return max(1, self.rank // 2) if self.grow is None else self.grow

    def claims(self) -> tuple[str, ...]:
        return ("the budget of ranks",)

    def delta(self, site: Site) -> Triangular:
        site.place.check_rank(self.init_rank, "triadaptlora")
        return Triangular(site.place, site.settled.get("rank", self.init_rank), self.init_rank,
                          self.step, self.alpha, self.preserve)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        yield from crooked([(t.B, t.A) for _, t in tuned.terms(Triangular)], self.ortho)

    def controller(self, tuned: Tuned) -> Widening:
        terms = dict(tuned.terms(Triangular))
        return Widening(terms, tuned.resize, goal=self.rank * len(terms), grow=self.step,
                        warmup=self.warmup, every=self.every, linear=self.law == "linear",
                        label="triadaptlora")

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank if rank is None else rank

    def count(self, place: Place, rank: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank (default: at the start)."""
        r = self.init_rank if rank is None else rank
        return r * (place.out + place.inp) + 2 * core_size(self.init_rank, self.step, r)
