from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ....blocks.choose.masks import drawn
from ....blocks.update.turns import Turns
from ....blocks.weight.located import Located
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_rate

if TYPE_CHECKING:
    from ....core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Loca(Method):
    """LoCA: a few entries of the update's cosine transform, and their places train too.

    ``W' = W + alpha C^T S D``, C (out, out) and D (in, in) orthonormal DCT-II, S (out, in) zero but
    for ``S[u_k, v_k] += a_k``, k = 1..n. Places are real numbers that forward rounds; the gradient
    of u_k is ``alpha a_k (T[u_k + 1, v_k] - T[u_k - 1, v_k]) / 2``, T the transform of dL/dW, that
    of v_k alike, one-sided at a border: an estimate. Entries that meet add up
    (`met` of the term counts them).

    By turns `coefficient_steps` updates move the a alone and `location_steps` the places alone,
    within the matrix; after the share `search` of the run the places stay what they round to.
    Either keeps its moments while the other's turn lasts. Without the length of the run
    (``tuned.total_steps``, set by fit) the turns go on.

    Start: a = 0: the pre-trained function exactly; places drawn for every matrix from `seed`,
    without replacement. Trains n coefficients per matrix (24,000 on q and v of RoBERTa-base, n =
    1000) and, while they move, 2 n places. Kept for backward: x; the update is made again, panel by
    panel. Merges exactly. No weight decay.

    From memory of the paper (10, 20, a tenth of the run) or ours, where it says none: alpha, the
    rate of the places, zero for a. Made per panel of the weight, never token by token.
    """

    paper: ClassVar[str] = ("LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient "
                            "Fine-Tuning, ICLR 2025")
    tier: ClassVar[str] = "from the text"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)
    small: ClassVar[dict[str, float]] = {"n": 40, "coefficient_steps": 1, "location_steps": 1,
                                         "search": 0.5, "location_rate": 200.0}

    n: int = setting(1000, "coefficients per matrix")
    alpha: float = setting(1.0, "scale of the update")
    coefficient_steps: int = setting(10, "B_a, updates of a turn that moves coefficients")
    location_steps: int = setting(20, "B_l, updates of a turn that moves places")
    search: float = setting(0.1, "B_s, share of the run in which places move", other=(0.2,))
    location_rate: float = setting(10.0, "learning rate of places relative to coefficients")
    seed: int = setting(0, "of the first places")

    def __post_init__(self) -> None:
        if self.n < 1 or self.coefficient_steps < 1 or self.location_steps < 1:
            raise RecipeError("loca: n, coefficient_steps and location_steps are at least 1")
        if not 0 < self.search <= 1:
            raise RecipeError(f"loca: search={self.search} is a share of the run, in (0, 1]; "
                              "fourierft has places that stay")
        check_rate("loca", self.location_rate, "location_rate")

    def delta(self, site: Site) -> Located:
        place = site.place
        out, inp = place.out, place.inp
        if self.n > out * inp:
            raise RankError(f"loca: n={self.n} coefficients, {place.name} has {out * inp} entries")
        index = drawn(out * inp, self.n, self.seed, place.name).to(site.weight.device)
        term = Located(out, inp, index, self.alpha)
        term.at.burnish_lr = self.location_rate
        return term

    def controller(self, tuned: Tuned) -> Turns:
        return Turns([t for _, t in tuned.terms(Located)], self.coefficient_steps,
                     self.location_steps, self.search)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix: coefficients, and both numbers of their places."""
        return 3 * self.n
