from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.paired import Paired
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Summed(Paired):
    """``Delta = s (B_1 + .. + B_n) A``: A (r / n, in), B (n, out, r / n)."""

    def __init__(self, place: Place, rank: int, blocks: int, scale: float):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank // blocks, place.inp))
        nn.init.uniform_(self.A, -place.inp**-0.5, place.inp**-0.5)
        self.B = nn.Parameter(torch.zeros(blocks, place.out, rank // blocks))
        self.A.burnish_decay = self.B.burnish_decay = False

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B.sum(0) * self.scale


@dataclass(frozen=True, kw_only=True)
class BlockLora(Method):
    """Block-LoRA: the rank in blocks that share one down-projection.

    ``W' = W + s (sum_i B_i) A``, i = 1..blocks, A (rank / blocks, in), B_i (out, rank / blocks),
    s = alpha / rank. The sum is taken before the product: the chain costs rank / blocks per token.

    Plainly: the update has rank at most rank / blocks, and since all B_i get the same gradient and
    begin alike they stay alike. It is a LoRA of rank / blocks whose B learns at `blocks` times the
    rate, and should be compared as such. (Starts and scale unconfirmed; no code is public.)

    Start: A uniform in +-1/sqrt(in), B_i = 0: the pre-trained function exactly. Trains rank /
    blocks in + rank out per matrix. Kept for backward: x, rank / blocks per token. Merges
    exactly, and exports as plain LoRA of rank / blocks. No weight decay.
    """

    paper: ClassVar[str] = ("One Head Eight Arms: Block Matrix based Low Rank Adaptation for "
                            "CLIP-based Few-Shot Learning (2025)")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"blocks": 2}

    rank: int = setting(8, "rank of the update times blocks", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    blocks: int = setting(4, "blocks that share A", other=(1,))

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.rank % self.blocks:
            raise RecipeError(f"block_lora: rank={self.rank} is cut in blocks={self.blocks} equal "
                              "parts, which it must be a multiple of")

    def delta(self, site: Site) -> Summed:
        place, most = site.place, min(site.place.out, site.place.inp)
        if not 1 <= self.rank // self.blocks <= most:
            raise RankError(f"block_lora: rank {self.rank} in {self.blocks} blocks does not fit "
                            f"{place.name} ({place.out} x {place.inp}); the largest rank there is "
                            f"{most * self.blocks}")
        return Summed(place, self.rank, self.blocks, self.alpha / self.rank)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank // self.blocks

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank // self.blocks * place.inp + self.rank * place.out
