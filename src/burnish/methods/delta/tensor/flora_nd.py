from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.tucker import Tucker
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class FloraNd(Method):
    """FLoRA (N-D): a Tucker decomposition with as many axes as the weight has.

    ``W' = W + s G x_1 U_1 x_2 U_2 .. x_N U_N``, G (r_1, .., r_N), U_i (d_i, r_i): a linear is
    ``y = x W^T + b + s drop(x) U_in G^T U_out^T``, G (rank, in_rank); a convolution has the axes
    (out, in / groups, kernel ...), a kernel's axis of size k the rank min(k, kernel_rank). An
    embedding is a table of two axes (the authors add one vector to all of its rows instead).
    s is a plain factor; nothing is divided by a rank.

    Start: U_i Kaiming-normal (deviation 1 / sqrt(2 r_i)), G = 0: the pre-trained function exactly;
    the first step moves G alone. Trains the product of all r_i + sum d_i r_i per matrix: 65,600 at
    4096 x 4096 with 8, 8; 4,690 at 256 x 256 x 3 x 3 with 8, 8, 3, 3. Kept for backward: x; the
    path runs again there. Merges exactly. No weight decay.

    The paper names no value for the ranks and s: 8, the kernel's own sides, and 1 are ours. (FLoRA
    of federated learning and Flora, the optimizer, are other methods.)
    """

    paper: ClassVar[str] = "FLoRA: Low-Rank Core Space for N-dimension (2024)"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha", "embedding"})
    small: ClassVar[dict[str, int]] = {"rank": 2}

    rank: int = setting(8, "rank of the axis of outputs", alias=("r",))
    in_rank: int | None = setting(None, "rank of the axis of inputs; None: rank", other=(1,))
    kernel_rank: int | None = setting(
        None, "largest rank of a kernel's axes; None: their own size", other=(2,))
    scale: float = setting(1.0, "s")
    dropout: float = setting(0.0, "dropout on the update's input")

    def __post_init__(self) -> None:
        check_dropout("flora_nd", self.dropout)
        if any(r is not None and r < 1 for r in (self.rank, self.in_rank, self.kernel_rank)):
            raise RecipeError("flora_nd: every rank is at least 1")

    def ranks(self, place: Place) -> tuple[int, ...]:
        """r_1 .. r_N; RankError where one is larger than its axis."""
        ranks = (self.rank, self.rank if self.in_rank is None else self.in_rank)
        sizes = (place.out, place.inp // place.kernel)
        for what, r, d in zip(("rank", "in_rank"), ranks, sizes, strict=True):
            if r > d:
                raise RankError(f"flora_nd: {what} {r} does not fit {place.name}, whose axis has "
                                f"{d}")
        most = self.kernel_rank
        if most is not None and place.axes and most > max(place.axes):
            raise RankError(f"flora_nd: kernel_rank {most} does not fit {place.name}, whose kernel "
                            f"is {' x '.join(map(str, place.axes))}")
        return (*ranks, *(min(k, most or k) for k in place.axes))

    def delta(self, site: Site) -> Tucker:
        return Tucker(site.place, self.ranks(site.place), self.scale, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        ranks = self.ranks(place)
        sizes = (place.out, place.inp // place.kernel, *place.axes)
        return math.prod(ranks) + sum(d * r for d, r in zip(sizes, ranks, strict=True))
