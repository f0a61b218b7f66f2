from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....blocks.weight.factor import Chain
from ....blocks.weight.start import begin
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Mica(Method):
    """MiCA: an update that writes into the directions which the weight uses least.

    ``y = x W^T + b + s (drop(x) A^T) B^T`` with B (out, rank) the left singular vectors of W = U S
    V^T that belong to its `rank` smallest singular values (the last of min(out, in)), frozen, and A
    (rank, in) trained; s = alpha / rank.

    Start: A = 0: the pre-trained function exactly. Trains rank in per matrix, half of LoRA's. Kept
    for backward: x, and no numbers of the rank. Merges exactly. The file holds B: singular vectors
    differ between devices, and those of equal values are no fixed ones. No weight decay. (Held
    against PEFT's implementation; the paper's figures were not met here.)
    """

    paper: ClassVar[str] = "Minor Component Adaptation (MiCA) (2026), arXiv:2604.01694"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "least directions that are written into", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("mica", self.dropout)

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        U = torch.linalg.svd(W, full_matrices=False).U
        return W.new_zeros(rank, W.shape[1]), U[:, -rank:]

    def delta(self, site: Site) -> Chain:
        site.place.check_rank(self.rank, "mica")
        term = begin(Chain(site.place, self.rank, self.alpha / self.rank, self.dropout), site,
                     self.start)
        term.B.requires_grad_(False)
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * place.inp
