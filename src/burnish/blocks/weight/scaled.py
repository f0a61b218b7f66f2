"""A product of two thin factors whose scale trains too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .paired import Paired


class Scaled(Paired):
    """``Delta = g s B A``: A (r, in) uniform, B (out, r) zero, g (1,) one at the start.

    g is as sensitive as the whole update is long, so it sets how fast the update grows.
    """

    def __init__(self, out: int, inp: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, inp).uniform_(-inp**-0.5, inp**-0.5))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.gain = nn.Parameter(torch.ones(1))
        self.gain.burnish_decay = False                  # type: ignore[attr-defined]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * (self.gain * self.scale)
