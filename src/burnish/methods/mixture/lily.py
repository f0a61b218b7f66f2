from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from ...blocks.weight.blended import Blended
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ...core.targets import match
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Lily(Method):
    """Lily: layers are tied together by factors that they share, a router blends them.

    ``h = x A^T``, ``y = W x + b + s h sum_e p_e B_e``, p the mean over all tokens of a call (over
    padding too) of ``softmax(R h)``. A (rank, in) is one for `stride` linears of a group that
    follow each other, the B_e (experts, rank, out) are one for the whole group, the router R
    (experts, rank) is each linear's own. A group are the linears of one size and one name (q_proj
    of every block), or, grouping="size", of one size whatever they are called.

    Start: A uniform in +-1/sqrt(in), R in +-1/sqrt(rank), B = 0: the pre-trained function exactly.
    Trains rank in per stride, experts rank out per group, experts rank per linear. Kept for
    backward: x; the rest is made again there. Not mergeable: the blend depends on the tokens, and
    a sample's outputs on those beside it in the batch. No weight decay.
    """

    paper: ClassVar[str] = ("Low-Rank Interconnected Adaptation across Layers (2024), "
                            "arXiv:2407.09946")
    tier: ClassVar[str] = "checked against an independent equation"
    merges: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    excused: ClassVar[Mapping[str, str]] = {
        "every_setting_acts on points": "by chance: linears of one name are of one size there"}

    rank: int = setting(32, "rank of every factor", alias=("r",))
    stride: int = setting(1, "linears of a group that share A", alias=("stride_A",))
    experts: int = setting(2, "factors B of a group", alias=("num_B",))
    scale: float = setting(1.0, "s, what the update is multiplied by", alias=("scaling",))
    grouping: Literal["name", "size"] = setting(
        "name", "what makes linears of one size a group")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.stride < 1 or self.experts < 1:
            raise RecipeError("lily: rank, stride and experts of at least 1 are expected")

    def repeats(self) -> int | None:
        return None                              # the first of a group holds what all share

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        places = match(anatomy) if asked is None else asked
        seen: dict[tuple[str, int, int, int], Blended] = {}
        numbers: dict[tuple[str, int, int, int], int] = {}
        for place, rows, out in linears(anatomy, self, places, anywhere=True, rank=self.rank):
            named = place.path.rpartition(".")[2] if self.grouping == "name" else ""
            width = out if rows is None else sum(b - a for a, b in rows)
            group = named, place.inp, width, out
            last, number = seen.get(group), numbers.get(group, 0)
            own = "B" * (last is None) + "A" * (number % self.stride == 0)
            A, B = (None, None) if last is None else (last.A, last.B)
            if "A" in own:
                bound = place.inp**-0.5
                A = nn.Parameter(torch.empty(self.rank, place.inp).uniform_(-bound, bound))
            if "B" in own:
                B = nn.Parameter(torch.zeros(self.experts, self.rank, width))
            made = Blended(A, B, self.scale, own, rows, out)
            seen[group], numbers[group] = made, number + 1
            for p in made.parameters():
                p.burnish_decay = False          # type: ignore[attr-defined]
            yield Branch(place.path, made, read=(place.path, "input"))
