from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ....blocks.linalg import svd
from ....blocks.update.objective import OnWeights
from ....blocks.weight.start import decomposed
from ....blocks.weight.triplets import crooked
from ....blocks.weight.triplets_less import LessTriplets
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Sorsa(Method):
    """SORSA: the principal singular triplets of W train, and are kept close to orthonormal.

    ``W = U S V^T``, P0 = U_r (out, rank), E0 = S_r, Q0 = V_r^T (rank, in), ``W' = (W - s P0
    diag(E0) Q0) + s P diag(E) Q``, s = alpha / rank, 1 by default (only then is the residual W
    without its principal part); realised as an update on W, so the base is never written. Added to
    the loss: ``ortho * mean over all P, Q of ||P^T P - I||_F, ||Q Q^T - I||_F`` (not squared). The
    paper's pull is gamma / (largest learning rate) times that, 4e-4 / 3e-5 = 13.3, which is the
    default; it rides on the loss, so once per update, however many batches are accumulated (the
    authors' code adds it once per batch).

    Start: P0, E0, Q0: the pre-trained function exactly, the penalty nearly nothing. Trains rank
    (in + out + 1) per matrix. Kept for backward: x, 2 rank per token. Merges exactly;
    exports as plain LoRA of twice the rank. The file holds the start too. No weight decay.
    """

    paper: ClassVar[str] = ("SORSA: Singular Values and Orthonormal Regularized Singular Vectors "
                            "Adaptation of Large Language Models (2024), arXiv:2409.00055")
    tier: ClassVar[str] = "checked against the paper's numbers"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(128, "principal triplets that train", alias=("r",))
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)",
                                  alias=("sorsa_alpha",), other=(8.0,))
    ortho: float = setting(13.3, "weight of the penalty: gamma over the learning rate")

    def __post_init__(self) -> None:
        if self.ortho < 0 or not (self.alpha is None or self.alpha > 0):
            raise RecipeError("sorsa: ortho >= 0 and alpha > 0 are expected")

    def delta(self, site: Site) -> LessTriplets:
        place = site.place
        place.check_rank(self.rank, "sorsa")
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        term = LessTriplets(place, self.rank, scale).to(site.weight.device)
        if not site.blank:
            U, S, Vt = decomposed(site, lambda W: svd(W, self.rank))
            term.begin(U, S, Vt)
        return term

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        if self.ortho:
            yield from crooked([(t.P, t.Q) for _, t in tuned.terms(LessTriplets)], self.ortho)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 2 * self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp + 1)
