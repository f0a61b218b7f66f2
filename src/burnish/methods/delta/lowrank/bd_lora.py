from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.paired import Paired
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout


class Blockwise(Paired):
    """``Delta = s B A``, one of the two block-diagonal: A (r, in / n) or B (out, r / n) hold the
    blocks one below the other."""

    def __init__(self, place: Place, rank: int, blocks: int, cut: str, scale: float,
                 dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.cut, self.blocks = cut, blocks
        reads = place.inp // (blocks if cut == "A" else 1)
        self.A = nn.Parameter(torch.empty(rank, reads).uniform_(-reads**-0.5, reads**-0.5))
        self.B = nn.Parameter(torch.zeros(place.out, rank // (blocks if cut == "B" else 1)))
        self.A.burnish_decay = self.B.burnish_decay = False

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B = ((torch.block_diag(*t.chunk(self.blocks)) if name == self.cut else t)
                for name, t in (("A", self.A), ("B", self.B)))
        return A, B * self.scale


@dataclass(frozen=True, kw_only=True)
class BdLora(Method):
    """BD-LoRA: LoRA of which one factor is block-diagonal, so that it is served in shards.

    ``y = x W^T + b + s drop(x) A^T B^T``, s = alpha / rank, with n = `shards` blocks on the
    diagonal of A (n blocks of rank / n by in / n) or of B (n of out / n by rank / n), and nothing
    beside them. A server that cuts a weight by its outputs wants B in blocks, by its inputs A: then
    every device has what it needs of both factors, and nothing is sent between them for the
    adapter. sharded="role" takes A for what ends attention and MLP (``o_proj``, ``down_proj``) and
    B for all else; n is the number of devices that will serve it.

    Start: A uniform in +-1/sqrt(number of inputs that a row reads), B = 0: the pre-trained function
    exactly. Trains rank (in / n + out) or rank (in + out / n) per matrix: against a LoRA of as many
    numbers its rank is larger, and its update has zeros where no block stands. Kept for backward:
    x, rank per token. Merges exactly; exports as PEFT's LoRA with `use_bdlora`, or as
    plain LoRA beside other parts. No weight decay. (The start is our reading.)

    Errors: `shards` that do not divide the rank and the cut side. Where adapters are merged before
    they are served, lora has more of the same size.
    """

    paper: ClassVar[str] = ("Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor "
                            "Parallel LoRA Serving (2025), arXiv:2510.23346")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    small: ClassVar[dict[str, int]] = {"shards": 2}

    rank: int = setting(16, "rank of the update", alias=("r",), other=(2, 8))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    shards: int = setting(4, "blocks of the factor that is cut", alias=("nblocks",), other=(1,))
    sharded: Literal["role", "A", "B"] = setting(
        "role", "the factor that is cut; role: A of what ends attention and MLP, B of the rest")
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("bd_lora", self.dropout)
        if self.shards < 1 or self.rank < 1 or self.rank % self.shards:
            raise RecipeError(f"bd_lora: rank={self.rank} is cut in shards={self.shards} equal "
                              "parts, which it must be a multiple of")

    def _side(self, place: Place) -> str:
        ends = place.role.removeprefix("cross_") in ("o", "down", "fc2")
        return self.sharded if self.sharded != "role" else "A" if ends else "B"

    def delta(self, site: Site) -> Blockwise:
        place, side = site.place, self._side(site.place)
        place.check_rank(self.rank, "bd_lora")
        if (n := place.inp if side == "A" else place.out) % self.shards:
            what = "inputs" if side == "A" else "outputs"
            raise RecipeError(f"bd_lora: shards={self.shards} does not divide the {n} {what} of "
                              f"{place.name}, whose {side} is cut")
        return Blockwise(place, self.rank, self.shards, side, self.alpha / self.rank, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        whole, cut = (place.out, place.inp) if self._side(place) == "A" else (place.inp, place.out)
        return self.rank * whole + self.rank * cut // self.shards
