from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ....blocks.choose.gates import Search
from ....blocks.weight.gated import Gated
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Diffora(Method):
    """DiffoRA: in every block the LoRAs that are worth having, found by gates that train.

    ``y = x W^T + b + g s (x A^T) B^T``, A (rank, in), B (out, rank), s = alpha / rank, ``g = 2
    sigmoid(gate)``, one number per matrix that begins at g = 1. Search: the factors train alone
    until `warmup` of the run (with B = 0 a gate has no gradient), then gates and factors by turns,
    an update each, the gates at `gate_rate` times the rate: first-order steps of the bilevel
    problem, in which the batches of the gates' turns stand for the validation data. At `search` of
    the run the share `density` of each block's matrices (one at least) that has the largest gates
    stays; its A and B begin again, without gates and with no moments. The others have no update
    any more: their tensors are empty and they keep nothing.

    Of the paper's text (unconfirmed; no code is public): gates by sigmoid for each matrix, rather
    than a softmax over the block, which would divide every scale by its matrices; unselected
    matrices are left alone, where the paper has them share factors. Without the number of updates,
    or in a run that has none left after the search, nothing is decided, and it is LoRA.

    Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly. Trains rank (in +
    out) + 1 per matrix in the search, rank (in + out) per matrix that stays. Kept for backward: x,
    rank per token. Merges exactly. No weight decay.
    """

    paper: ClassVar[str] = ("DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via "
                            "Differential Low-Rank Matrix Adaptation (2025)")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("resize", "schedule")

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    density: float = setting(0.5, "share of a block's matrices that stay")
    warmup: float = setting(0.05, "share of the run before gates train",
                            beside={"search": 0.9})
    search: float = setting(0.3, "share of the run after which it is decided who stays")
    gate_rate: float = setting(5.0, "learning rate of gates over that of the factors",
                               beside={"search": 0.9})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"diffora: density={self.density}: expected a share above 0, up to 1")
        if not 0 <= self.warmup < self.search < 1:
            raise RecipeError("diffora: 0 <= warmup < search < 1 are expected, shares of the run")
        if not 0 < self.gate_rate < math.inf:
            raise RecipeError(f"diffora: gate_rate multiplies a learning rate, {self.gate_rate} "
                              "is no rate")

    def claims(self) -> tuple[str, ...]:
        return ("which updates stay",)

    def delta(self, site: Site) -> Gated:
        site.place.check_rank(self.rank, "diffora")
        term = Gated(site.place, site.settled.get("rank", self.rank), self.alpha / self.rank,
                     site.settled.get("gates", 1))
        term.gate.burnish_lr = self.gate_rate
        return term

    def controller(self, tuned: Tuned) -> Search:
        return Search(dict(tuned.terms(Gated)), tuned.resize, lambda: tuned.current_optimizer,
                      warmup=self.warmup, search=self.search, density=self.density,
                      label="diffora")

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank if rank is None else rank

    def count(self, place: Place, rank: int | None = None, gates: int = 1) -> int:
        """Trainable parameters on one matrix (default: in the search)."""
        return (self.rank if rank is None else rank) * (place.out + place.inp) + gates
