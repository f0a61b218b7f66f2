from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.granular import Granular
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Gralora(Method):
    """GraLoRA: the weight as a grid of blocks, each with a low-rank update of its own.

    k = cells, the side of the grid, s = alpha / (rank + beside). Block (j, n), of the j-th of k
    runs of outputs and the n-th of k runs of inputs: ``W'_jn = W_jn + s B_jn A_jn``, A_jn (rank /
    k, in / k), B_jn (out / k, rank / k). As many numbers and operations as LoRA of that rank, and
    a rank of up to k rank: an outlier among the inputs moves the gradients of its own column of
    blocks alone. `beside` > 0 adds a plain pair of that rank to the whole (the paper's hybrid, for
    small ranks), under the same s.

    Start: A uniform in +-sqrt(k / in) (+-1/sqrt(in) of the plain pair), B = 0: the pre-trained
    function exactly. Trains (rank + beside) (in + out) per matrix. Kept for backward: x; the path
    runs again there, with k products of a k-th of the sizes. Merges exactly. No weight decay. k
    divides rank, in and out.
    """

    paper: ClassVar[str] = ("GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient "
                            "Fine-Tuning (2025), arXiv:2505.20355")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})

    rank: int = setting(32, "rank of the update; blocks have a k-th of it", alias=("r",),
                       other=(8,))
    alpha: float = setting(64.0, "numerator of the scale", alias=("lora_alpha",))
    cells: int = setting(2, "runs of inputs, and of outputs", alias=("gralora_k",), other=(4,))
    beside: int = setting(0, "rank of a plain pair beside the blocks", alias=("hybrid_r",),
                          other=(2,))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("gralora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("gralora", self.dropout)
        if self.cells < 1 or self.rank < 1:
            raise RecipeError(f"gralora: rank={self.rank}, cells={self.cells}: expected at least 1")
        if self.rank % self.cells:
            raise RecipeError(f"gralora: cells={self.cells} does not divide rank={self.rank}")
        if self.beside < 0:
            raise RecipeError(f"gralora: beside={self.beside}: expected at least 0")

    def delta(self, site: Site) -> Granular:
        place, k = site.place, self.cells
        if place.out % k or place.inp % k:
            raise RecipeError(f"gralora: cells={k} does not divide {place.name} ({place.out} x "
                              f"{place.inp})")
        if self.rank // k > (top := min(place.out, place.inp) // k):
            raise RankError(f"gralora: rank {self.rank} does not fit {place.name} ({place.out} x "
                            f"{place.inp}); the largest rank there is {top * k}")
        if self.beside:
            place.check_rank(self.beside, "gralora(beside=...)")
        return Granular(place.out, place.inp, self.rank, k, self.beside,
                        self.alpha / (self.rank + self.beside), self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return (self.rank + self.beside) * (place.out + place.inp)
