from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ....blocks.update.objective import OnWeights
from ....blocks.weight.least import Cut, Graded, least
from ....blocks.weight.start import decomposed
from ....blocks.weight.triplets import crooked
from ....core.errors import RankError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


def _squares(E: nn.Parameter, weight: float) -> Tensor:
    return weight * E.square().sum()


@dataclass(frozen=True, kw_only=True)
class Kasa(Method):
    """KaSA: a weight without its least directions, and an update in the form of triplets.

    ``W = sum_i S_i u_i v_i^T`` of m = min(in, out) triplets, falling:

        y = sum_{i <= m - rank} S_i u_i v_i^T x + b + s B diag(E) A drop(x)

    A (rank, in), B (out, rank), s = alpha / rank: the `rank` least directions of the weight, taken
    for noise, make room for as many that train. Realised as an update on W, so the base is never
    written; of what left nothing is dropped. Added to the loss, over all matrices: ``weight sum E^2
    + ortho (||B^T B - I||_F + ||A A^T - I||_F)``, so that E stays small and the factors near to
    singular vectors.

    Start: A uniform in +-1/sqrt(in), E normal, B = 0: the weight without its least directions, not
    quite the pre-trained function. Trains rank (in + out + 1) per matrix; U S and V of what left,
    rank (in + out) numbers, are in the file. Kept for backward: x, rank per token.
    Merges exactly. Exports as PEFT's LoRA with `kasa_config`, or as plain LoRA of twice the rank.
    No weight decay. A full decomposition per matrix at the start: minutes for a large model. Where
    small directions matter (a base that is quantised or pruned), take lora.

    Departures: none known; both weights of the penalty are the authors' on GLUE. The sum of the
    penalty over matrices, not its mean, is PEFT's.
    """

    paper: ClassVar[str] = ("KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language "
                            "Models (2024), arXiv:2412.06071")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "of the update, and directions that leave", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    weight: float = setting(1e-4, "of the sum of the squares of E in the loss")
    ortho: float = setting(1e-3, "weight of how far A and B are from singular vectors")

    def __post_init__(self) -> None:
        check_dropout("kasa", self.dropout)

    def delta(self, site: Site) -> tuple[Graded, Cut]:
        place, most = site.place, min(site.place.out, site.place.inp)
        if not 1 <= self.rank < most:
            raise RankError(f"kasa: rank {self.rank} does not fit {place.name} ({place.out} x "
                            f"{place.inp}): one direction at least is to stay, so the largest "
                            f"rank there is {most - 1}")
        cut = Cut(place, self.rank).to(site.weight.device)
        if not site.blank:
            U, V = decomposed(site, lambda W: least(W, self.rank))
            cut.U.copy_(U)
            cut.V.copy_(V)
        return Graded(place, self.rank, self.alpha / self.rank, self.dropout), cut

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        terms = [t for _, t in tuned.terms(Graded)]
        for t in terms if self.weight else ():
            yield OnWeights((t.E,), partial(_squares, t.E, self.weight))
        if self.ortho:                           # crooked takes the mean over 2 n factors
            yield from crooked([(t.B, t.A) for t in terms], self.ortho * 2 * len(terms))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp + 1)
