from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.linalg import svd
from ....blocks.weight.paired import Paired
from ....blocks.weight.start import decomposed
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Aside(Paired):
    """``Delta = s (I - U U^T) B A (I - V V^T)``: U (out, k) and V (in, k) are kept, orthonormal."""

    def __init__(self, place: Place, rank: int, kept: int, scale: float):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, place.inp))
        nn.init.uniform_(self.A, -place.inp**-0.5, place.inp**-0.5)
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.A.burnish_decay = self.B.burnish_decay = False
        self.register_buffer("U", torch.zeros(place.out, kept))
        self.register_buffer("V", torch.zeros(place.inp, kept))

    def pair(self) -> tuple[Tensor, Tensor]:
        B = (self.B - self.U @ (self.U.t() @ self.B)) * self.scale
        return self.A - (self.A @ self.V) @ self.V.t(), B


@dataclass(frozen=True, kw_only=True)
class CompLora(Method):
    """Comp-LoRA: a low-rank update that leaves the principal directions of W as they are.

    ``W = U S V^T``, ``W' = W + s (I - U_k U_k^T) B A (I - V_k V_k^T)``, A (rank, in), B (out,
    rank), s = alpha / rank: the k largest singular triplets of W are singular triplets of W', so
    none of them is disturbed. The factors are projected, once a step, not the tokens. (That both
    sides are projected, and the choice of k, are unconfirmed; no code is public.)

    Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly. Trains rank (in +
    out) per matrix. Kept for backward: x, rank per token. U_k and V_k, kept (in + out)
    numbers, are in the file; an export holds the projected factors alone, a plain LoRA. Merges
    exactly. No weight decay.
    """

    paper: ClassVar[str] = ("Complementary Subspace Low-Rank Adaptation of Vision-Language Models "
                            "for Few-Shot Classification (2025)")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"kept": 4}

    rank: int = setting(2, "rank of the update", alias=("r",))
    alpha: float = setting(2.0, "numerator of the scale", alias=("lora_alpha",))
    kept: int = setting(64, "k, principal directions that stay", other=(2,))

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise RecipeError(f"comp_lora: kept={self.kept}: expected at least 1; lora keeps none")

    def delta(self, site: Site) -> Aside:
        place, most = site.place, min(site.place.out, site.place.inp)
        if not 1 <= self.rank <= most - self.kept:
            raise RankError(f"comp_lora: rank {self.rank} beside kept={self.kept} does not fit "
                            f"{place.name} ({place.out} x {place.inp}): they have {most} together")
        term = Aside(place, self.rank, self.kept, self.alpha / self.rank).to(site.weight.device)
        if not site.blank:
            U, _, Vt = decomposed(site, lambda W: svd(W, self.kept))
            term.U.copy_(U)
            term.V.copy_(Vt.t())
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
