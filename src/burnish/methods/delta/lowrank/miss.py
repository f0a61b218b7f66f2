from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.shards import Shards
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Miss(Method):
    """MiSS: matrix shard sharing, the cheapest low-rank update (first published as Bone, DiSHA).

    The input is cut into runs of `rank` and the runs are summed (zero-padded at the end):
    ``y = x W^T + (sum_g x_g) D`` with D (rank, out); so ``Delta = D^T [I I ... I]``, a LoRA with a
    fixed tiled-identity A and no scale. ``mini`` makes D (rank, mini), repeated out / mini times.

    Start: D = 0: the pre-trained function exactly. Trains rank out (mini: rank mini) per matrix.
    Kept for backward: rank numbers per token; the layer's input is not needed, and dropout draws
    its mask again. Merges exactly. No weight decay.
    """

    paper: ClassVar[str] = "MiSS / DiSHA / Bone (2024), arXiv:2409.15371"
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(64, "length of a shard", alias=("r",))
    mini: int = setting(0, "width of D when it is repeated along out; 0: not repeated")
    dropout: float = setting(0.0, "dropout on the input before it is summed",
                             alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("miss", self.dropout)

    def delta(self, site: Site) -> Shards:
        place = site.place
        place.check_rank(self.rank, "miss")
        if self.mini < 0 or self.mini and place.out % self.mini:
            raise RecipeError(f"miss: mini={self.mini} does not divide the {place.out} outputs of "
                              f"{place.name}")
        term = Shards(place, self.rank, self.mini or place.out, self.dropout)
        term.D.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (self.mini or place.out)
