from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.paired import Paired
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout


class Summed(Paired):
    """``Delta = s B A P``: A (r, in / group), B (out, r); P adds up the inputs of a group."""

    def __init__(self, place: Place, rank: int, group: int, scale: float, dropout: float):
        super().__init__()
        self.group, self.scale, self.dropout = group, scale, dropout
        reads = place.inp // group
        self.A = nn.Parameter(torch.empty(rank, reads).uniform_(-reads**-0.5, reads**-0.5))
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.A.burnish_decay = self.B.burnish_decay = False

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A.repeat_interleave(self.group, 1), self.B * self.scale


@dataclass(frozen=True, kw_only=True)
class QaLora(Method):
    """QA-LoRA: a low-rank update that is one number for a group of inputs, as a grid's zero is.

    ``y = W x + b + s B A P drop(x)``: P x (in / group,) adds up the inputs of each group, A (rank,
    in / group), B (out, rank), s = alpha / rank. Of every output the update is the same over all
    inputs of a group: where W is held on a grid with a zero and a step for each output and group
    (``rtn(bits=4, group=32)``), merging moves the zeros alone. The steps and the codes stay, so a
    merged weight is quantised again without a further error. Give the storage's group.

    Start: A uniform in +-1/sqrt(in / group), B = 0: the pre-trained function exactly. Trains rank
    (in / group + out) per matrix. Kept for backward: x, rank per token. Merges exactly;
    exports as plain LoRA. No weight decay. Without a quantised base to go back to, lora has more
    to say.

    Departures: none known; PEFT's `use_qalora` multiplies the mean of a group by the number of
    groups, which its folders are read with.
    """

    paper: ClassVar[str] = ("QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language "
                            "Models (2023), arXiv:2309.14717")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    small: ClassVar[dict[str, int]] = {"group": 4}

    rank: int = setting(16, "rank of the update", alias=("r",), other=(2,))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    group: int = setting(32, "inputs that share a number, as in the storage",
                         alias=("qalora_group_size",), other=(2,))
    dropout: float = setting(0.0, "dropout on the input", alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("qa_lora", self.dropout)
        if self.group < 1:
            raise RecipeError(f"qa_lora: group={self.group}: expected at least 1; 1 is lora")

    def delta(self, site: Site) -> Summed:
        place = site.place
        if place.inp % self.group:
            raise RecipeError(f"qa_lora: group={self.group} does not divide the {place.inp} inputs "
                              f"of {place.name}")
        most = min(place.out, place.inp // self.group)
        if not 1 <= self.rank <= most:
            raise RankError(f"qa_lora: rank {self.rank} does not fit {place.name} ({place.out} x "
                            f"{place.inp}) in groups of {self.group}; the largest rank there is "
                            f"{most}")
        return Summed(place, self.rank, self.group, self.alpha / self.rank, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.inp // self.group + place.out)
