"""What a small step on some input channels of a weight would gain, and what it would keep.

Streamed: one number for each channel, whatever the weight's size.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...core.site import Place
from .observe import Reads, Statistic, wide


def channels(place: Place) -> int:
    """Input channels of the layer that a matrix is of."""
    return place.groups * place.inp // place.kernel


def per_channel(place: Place, M: Tensor) -> Tensor:
    """An (out, in) matrix' squares, summed over what belongs to one input channel, (channels,)."""
    parts = wide(M).reshape(place.groups, place.out // place.groups, -1, place.kernel)
    return parts.square().sum((1, 3)).flatten()


def ranked(place: Place, W: Tensor) -> Tensor:
    """Channels by the norm of their weights, the largest first; of equal ones the first."""
    return per_channel(place, W).argsort(descending=True, stable=True)


class Contribution(Statistic):
    """gain (channels,): the squares of dL/dW summed over what belongs to a channel, averaged over
    batches, which is what SGD of a small rate takes off a batch's loss, over that rate. order:
    channels as :func:`ranked`. positions: numbers of one channel in one row of a batch.

    given: gains are known, and no gradient is read.
    """

    condenses: ClassVar[bool] = True                 # nothing is settled before all is read
    turns: Literal["budget", "blocks", "once"] = "once"

    def __init__(self, place: Place, given: bool = False):
        self.place = place
        self.reads: Reads = "input" if given else "both"     # type: ignore[misc]
        self.total: Tensor = torch.zeros(channels(place))
        self.order: Tensor = torch.arange(channels(place))
        self.batches, self.positions = 0, 0

    @property
    def key(self) -> Any:
        return id(self)                              # weights and gradients are its own place's

    @property
    def nbytes(self) -> int:
        return 12 * channels(self.place)

    def weigh(self, W: Tensor) -> None:
        self.order = ranked(self.place, W)

    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        self.positions = max(self.positions, x[0].numel() // channels(self.place))

    @torch.no_grad()
    def pull(self, g: Tensor) -> None:
        self.total = self.total.to(g.device) + per_channel(self.place, g)
        self.batches += 1

    def cost(self, itemsize: int) -> int:
        """Bytes for one channel: its numbers in one row, and the gradients of its weights."""
        weights = self.place.out // self.place.groups * self.place.kernel
        return self.positions * itemsize + 4 * weights

    @property
    def gain(self) -> Tensor:
        return self.total / max(1, self.batches)
