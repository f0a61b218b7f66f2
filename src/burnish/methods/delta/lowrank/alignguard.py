from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ....blocks.choose.observe import OutputCovariance
from ....blocks.linalg import svd
from ....blocks.update.objective import OnWeights
from ....blocks.weight.guarded import Collision, Guarded
from ....blocks.weight.start import decomposed
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Alignguard(Method):
    """AlignGuard-LoRA: a LoRA whose part along directions that safety depends on is held back.

    ``W' = W + Delta, Delta = s B A``, A (rank, in), B (out, rank), s = alpha / rank. Gradients G of
    the loss on safety data give ``F = sum G G^T``; U (out, directions) its largest eigenvectors, mu
    their values over the largest, ``P = U U^T``, ``D_A = P Delta`` and ``D_T = (I - P) Delta``.

        loss + align ||diag(mu)^(1/2) U^T Delta||^2 + task ||D_T||^2
             + collision sum_ij eta_ij |D_A,ij D_T,ij|
        eta = 1 + emphasis sigmoid(|W + Delta| - large)

    Reads the safety data first: ``tune(..., calibration=batches)``, `samples` of them at most. U
    and mu are in the file, so a load needs no data. The norms cost rank x rank; the collision looks
    at W and Delta a run of columns at a time, at every update (``collision=0`` leaves it out).

    The paper's geodesic term ``<D_A, D_T>^2 / (|D_A|^2 |D_T|^2)`` is left out: with an orthogonal
    projector it is nothing whatever Delta is. (unconfirmed: all constants; F by outputs, with mu
    relative to the largest so that `align` does not depend on the scale of G; H = I in the task's
    term.) Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly, and no
    penalty. Trains rank (in + out) per matrix; kept for backward and merging as LoRA. No decay.
    """

    paper: ClassVar[str] = ("AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided "
                            "Decomposition and Riemannian-Geodesic Collision Regularization (2025)")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, Any]] = {"directions": 3}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    directions: int = setting(128, "of the outputs, that safety depends on most", alias=("m",))
    align: float = setting(0.25, "strength on the part along them", alias=("lambda_A",))
    task: float = setting(0.5, "strength on the rest", alias=("lambda_T",))
    collision: float = setting(0.05, "strength on entries that both change", alias=("lambda_NC",))
    emphasis: float = setting(1.0, "how much more a collision costs on large weights")
    large: float = setting(0.0, "size of a weight that counts as large", other=(2.0,))
    samples: int = setting(100, "safety samples to read at most", other=(1,))

    def __post_init__(self) -> None:
        if min(self.align, self.task, self.collision, self.emphasis) < 0:
            raise RecipeError("alignguard: align, task, collision and emphasis are strengths, 0 or "
                              "more")
        if self.directions < 1 or self.samples < 1:
            raise RecipeError("alignguard: directions and samples of at least 1 are expected")

    def observe(self, place: Place) -> OutputCovariance:
        return OutputCovariance(place.out)

    def delta(self, site: Site) -> Guarded:
        place = site.place
        place.check_rank(self.rank, "alignguard")
        if self.directions >= place.out:
            raise RankError(f"alignguard: directions={self.directions}: {place.name} has "
                            f"{place.out} outputs, and some must be left to the task")
        term = Guarded(place, self.rank, self.alpha / self.rank, self.directions)
        if not site.blank:
            U, S, _ = decomposed(site, lambda W: svd(site.seen.value.to(W), self.directions))
            term.guard(U, S)
        return term

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        places = {p.name: p for p in tuned.anatomy.places}
        for name, term in tuned.terms(Guarded):
            both = (term.A, term.B)
            for strength, norm in ((self.align, term.critical), (self.task, term.task)):
                if strength:
                    yield OnWeights(both, partial(_times, strength, norm))
            if self.collision:
                meets = Collision(term, partial(tuned.weight, places[name]), self.collision,
                                  self.emphasis, self.large)
                yield OnWeights(both, meets.value, meets.grads)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)


def _times(strength: float, norm: Any) -> Any:
    return strength * norm()
