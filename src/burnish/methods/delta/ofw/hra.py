from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ....blocks.update.objective import OnWeights
from ....blocks.weight.reflections import Reflections
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Hra(Method):
    """HRA: the inputs of a weight pass a chain of reflections; lengths and angles of rows stay.

    ``W' = W H_1 H_2 .. H_r``, ``H_i = I - 2 u_i u_i^T / |u_i|^2``, U (in, rank): between OFT (it is
    orthogonal) and LoRA (it differs from W by rank r). The chain is one product of rank r on
    tokens (reflections.py); W is never turned and may be held in any form. ``penalty`` adds
    ``penalty |I - N^T N|_F^2``, N the normalised U, which drives the axes apart. (The paper's
    limit of an infinite penalty, Gram-Schmidt at every step, cannot start from the pre-trained
    function, whose equal pairs it would have to tear apart; it is not offered.)

    Start: u_{2i-1} = u_{2i}, Kaiming-uniform: pairs undo each other, the pre-trained function up to
    rounding; so `rank` is even. Trains rank in per matrix. Kept for backward: x, once for all
    layers that read it. Merges exactly. No weight decay.
    """

    paper: ClassVar[str] = ("Bridging The Gap between Low-rank and Orthogonal Adaptation via "
                            "Householder Reflection Adaptation (2024), arXiv:2405.17484")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "reflections, an even number", alias=("r",), other=(2,))
    penalty: float = setting(0.0, "strength of the pull towards axes at right angles")

    def __post_init__(self) -> None:
        if self.rank % 2 or not self.rank:
            raise RecipeError(f"hra: rank={self.rank}: an even number from 2 is expected, since "
                              "reflections start in pairs that undo each other")
        if self.penalty < 0:
            raise RecipeError(f"hra: penalty={self.penalty}: expected at least 0")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Reflections:
        site.place.check_rank(self.rank, "hra")
        return Reflections(site.place.inp, self.rank)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        if self.penalty:
            for _, t in tuned.terms(Reflections):
                yield OnWeights((t.U,), lambda t=t: self.penalty * t.slant())

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input (no other delta on the weight)."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * place.inp
