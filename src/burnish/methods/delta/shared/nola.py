from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.mixed import Mixtures
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Nola(Method):
    """NOLA: low-rank factors that are mixtures of random ones; the coefficients train.

    ``W' = W + s B A``, ``A = A_f + sum_j a_j A_j``, ``B = sum_j b_j B_j``, j = 1..k, s = alpha /
    rank. A_j (rank, in), B_j (out, rank) ~ U(-1, 1) / sqrt(k) and the frozen A_f ~ U(-1, 1) /
    sqrt(in) are drawn from `seed` and the place's name whenever they are wanted, and never stored:
    an adapter is 2 k numbers per matrix, whatever its size and rank. (A_f is not in the paper's
    formula but in its code: without it both gradients are nothing at the start.)

    Start: a = b = 0, so B = 0: the pre-trained function exactly. Trains 2 k per matrix. Kept for
    backward: x, rank numbers per token, and the sums A and B, of LoRA's size. Forward and backward
    draw k rank (in + out) numbers each per matrix, on the host: nanoseconds a number, so batches
    should be large. Merges exactly; exports as plain LoRA. No weight decay.
    """

    paper: ClassVar[str] = ("NOLA: Networks as Linear Combination of Low Rank Random Basis (2023), "
                            "arXiv:2310.02556")
    tier: ClassVar[str] = "checked against the paper's numbers"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"k": 16}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    k: int = setting(512, "random factors in either mixture", alias=("num_basis",))
    seed: int = setting(0, "of the random factors")

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"nola: k={self.k}: expected at least 1")

    def delta(self, site: Site) -> Mixtures:
        site.place.check_rank(self.rank, "nola")
        return Mixtures(site.place, self.rank, self.k, self.alpha / self.rank, self.seed)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def per_forward(self, place: Place) -> int:
        """Numbers kept for backward whatever the tokens: A and B."""
        return self.rank * (place.out + place.inp)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 2 * self.k
