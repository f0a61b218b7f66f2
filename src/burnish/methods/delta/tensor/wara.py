from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.wavelet import Wavelet
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

MODES = ("shared_feature", "per_band_weight")


@dataclass(frozen=True, kw_only=True)
class Wara(Method):
    """WaRA: a low-rank update between the sub-bands of a wavelet transform.

    H is the one-level orthonormal Haar transform of features, h = ceil(d / 2) sums of neighbours
    and h differences; s = alpha / rank.
    ``mode="shared_feature"``: one pair for both halves, ``Delta = s H_out^T (I_2 (x) B A) H_in``,
    A (rank, h_in), B (h_out, rank): a rank of up to 2 rank.
    ``mode="per_band_weight"``: a pair for each band of Delta's two-dimensional transform,
    ``Delta = s IDWT2(B_LL A_LL, B_LH A_LH, B_HL A_HL, B_HH A_HH)``.
    Odd sizes: a zero is added and what it became is cut off.

    Start: A Kaiming-uniform, B = 0: the pre-trained function exactly. Trains rank (h_in + h_out)
    per matrix, half of LoRA (32,768 at 4096 x 4096, rank 8), or four times that. Kept for backward:
    x; the path runs again there. Merges exactly. No weight decay.

    The paper's code cannot be read: s, the defaults and which form it runs are our readings. A
    later revision transforms over the grid of image patches instead: a linear map shared by all
    bands is then LoRA itself and is refused; which gates set it apart is not known, so that form is
    not built, nor Tiny-WaRA, whose core is not known either. Haar alone, one level.
    """

    paper: ClassVar[str] = "WaRA: Wavelet Low Rank Adaptation (2025)"
    tier: ClassVar[str] = "from the text"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})

    rank: int = setting(8, "rank of the map of a band", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    mode: str = setting("shared_feature", "one pair for both halves of the features, or one for "
                        "each band of the update", alias=("band_mode",),
                        other=("per_band_weight",))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"wara: rank={self.rank}: expected at least 1")
        if self.mode == "spatial":
            raise RecipeError(f"wara(mode={self.mode!r}): one linear map for all bands of a "
                              "transform over the grid commutes with it, which is lora; use lora, "
                              f"or one of {', '.join(MODES)}")
        if self.mode not in MODES:
            raise RecipeError(f"wara(mode={self.mode!r}): expected one of {', '.join(MODES)}")

    def delta(self, site: Site) -> Wavelet:
        place = site.place
        top = min(-(-place.out // 2), -(-place.inp // 2))
        if self.rank > top:
            raise RankError(f"wara: rank {self.rank} does not fit {place.name} ({place.out} x "
                            f"{place.inp}); the largest rank of its halves is {top}")
        return Wavelet(place.out, place.inp, self.rank, self.alpha / self.rank,
                       self.mode == "shared_feature")

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        pairs = 1 if self.mode == "shared_feature" else 4
        return pairs * self.rank * (-(-place.out // 2) + -(-place.inp // 2))
