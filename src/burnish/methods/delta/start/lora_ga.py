from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ....blocks.choose.observe import Gradient
from ....blocks.linalg import svd
from ....blocks.weight.start import LessStart
from ....core.errors import RankError, RecipeError
from ....core.method import setting
from ....core.site import Place, Site
from ._from import Starting


@dataclass(frozen=True, kw_only=True)
class LoraGa(Starting):
    """LoRA-GA: a low-rank update whose first step is the best one of rank 2r on the full weight.

    ``G = dL/dW``, the mean over the calibration batches, ``G = U S V^T``. Of the first 2r singular
    vectors A takes r and B the others: ``A0 = c V[:, :r]^T`` (rank, in), ``B0 = c U[:, r:2r]``
    (out, rank), ``c = out^(1/4) / sqrt(gamma)``, with `split` = "ArB2r"; "A2rBr" gives B the
    first r, "ArBr" takes turns, B first. ``W' = (W - s B0 A0) + s B A``, s = alpha / sqrt(rank).

    Reads data first: ``tune(..., calibration=batches)`` with labels, `samples` of them, through
    the model's own loss in evaluation mode; give batches of the size that trains. One gradient
    stands on the device at a time, the sums on the host, some layers a round.

    Start: the pre-trained function exactly (up to rounding over a storage, which holds the
    residual). Trains rank (in + out) per matrix. Kept for backward as LoRA. Merges exactly;
    exports as plain LoRA of twice the rank. The file holds A0 and B0, so a load needs no data.
    2 rank singular vectors must be there: smaller matrices are refused. No weight decay.
    """

    paper: ClassVar[str] = ("LoRA-GA: Low-Rank Adaptation with Gradient Approximation (2024), "
                            "arXiv:2407.05000")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    gamma: float = setting(16.0, "the larger, the smaller the factors start",
                           alias=("stable_gamma",))
    split: Literal["ArB2r", "A2rBr", "ArBr"] = setting(
        "ArB2r", "which singular vectors A and B start with", alias=("direction",))
    samples: int = setting(32, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if not self.gamma > 0 or self.samples < 1:
            raise RecipeError("lora_ga: gamma > 0 and samples >= 1 are expected")

    def observe(self, place: Place) -> Gradient:
        return Gradient(place.out, place.inp)

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        U, _, Vt = svd(seen.value.to(W), 2 * rank)
        first, second, odd, even = slice(rank), slice(rank, None), slice(1, None, 2), \
            slice(0, None, 2)
        a, b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[self.split]
        c = W.shape[0] ** 0.25 / math.sqrt(self.gamma)
        return c * Vt[a], c * U[:, b]

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)

    def delta(self, site: Site) -> LessStart:
        place = site.place
        most = min(place.out, place.inp) // 2
        if not 1 <= self.rank <= most:
            raise RankError(f"lora_ga: rank {self.rank} needs {2 * self.rank} singular vectors, "
                            f"{place.name} is {place.out} x {place.inp}; the largest rank there "
                            f"is {most}")
        return super().delta(site)
