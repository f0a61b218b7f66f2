from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....blocks.tape.replay import Mask
from ....blocks.weight.backward import again
from ....blocks.weight.dropped import drops
from ....blocks.weight.provided import Weighted, linear
from ....blocks.weight.term import Wrap
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


class Weighed(Wrap):
    """``W' = V * (1 + s B A)``, entry by entry; A (r, in), B (out, r)."""

    def __init__(self, place: Place, rank: int, scale: float, dropout: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, place.inp))
        nn.init.uniform_(self.A, -place.inp**-0.5, place.inp**-0.5)
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.A.burnish_decay = self.B.burnish_decay = False
        self.scale, self.dropout = scale, dropout

    def of(self, V: Tensor) -> Tensor:
        return V + self.added(V)

    def added(self, V: Tensor) -> Tensor:
        return V * (self.B @ self.A * self.scale).to(V.dtype)

    @property
    def whole(self) -> bool:
        return True

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor | None:
        """With dropout the base sees x and the rest ``drop(x)``: two products."""
        if not drops(self):
            return None
        inner = op.unwrapped
        mask, fresh = Mask(x, self.dropout), [True]

        def product(x: Tensor) -> Tensor:
            V = inner.dense(inner.base() if weight is None else weight).to(x.dtype)
            return F.linear(mask.first(x) if fresh and fresh.pop() else mask(x), self.added(V))

        reads = (*self.theta(), *inner.theta(), *(inner.held() if weight is None else (weight,)))
        return linear(x, inner, bias, weight) + again(product, x, reads)


@dataclass(frozen=True, kw_only=True)
class Hut(Method):
    """HUT: the weight is multiplied, entry by entry, by one plus a product of two thin factors.

    ``W' = W * (1 + s B A)``, A (rank, in), B (out, rank), s = alpha / rank: an update that is large
    where the weight is, and may have a far higher rank than B A. Where W is 0 it stays 0. With
    alpha = rank it is HiRA, PEFT's type of that name. (The paper's code is not public: that nothing
    is added besides, and s, are the best reading, unconfirmed.)

    Start: B = 0: the pre-trained function exactly. Trains rank (in + out) per matrix. Kept for
    backward: x. W' and its gradient are made for one layer at a time: the cost is rank in out per
    layer, whatever the tokens, against LoRA's tokens rank (in + out). Merges exactly. No decay.
    With dropout ``y = W x + W * (s B A) drop(x)``, two products; the mask is drawn again.
    """

    paper: ClassVar[str] = ("HUT: A More Computation Efficient Fine-Tuning Method With Hadamard "
                            "Updated Transformation (2024)")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of the factors", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))

    dropout: float = setting(0.0, "dropout on the input of what is added",
                             alias=("hira_dropout",))

    def __post_init__(self) -> None:
        check_dropout("hut", self.dropout)

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Weighed:
        site.place.check_rank(self.rank, "hut")
        return Weighed(site.place, self.rank, self.alpha / self.rank, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
