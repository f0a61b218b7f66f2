"""A binary mask on a frozen weight, chosen by scores that train.

    W' = V * 1[m > cut]        dm = dW' * V

The gradient passes straight through the step (masked.py). A file that only answers has one bit an
entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .masked import straight
from .pruned import packed, unpacked
from .term import Wrap


class Binary(Wrap):
    """m (out, in), all of them `init` at the start. Above the cut is one, on it zero."""

    def __init__(self, shape: torch.Size, init: float, cut: float):
        super().__init__()
        self.m = nn.Parameter(torch.full(shape, init))
        self.m.burnish_decay = False                 # to zero, which is a mask of zeros
        self.cut = cut

    def of(self, V: Tensor) -> Tensor:
        return straight(V, self.m.to(V.dtype), self.m.detach() > self.cut)

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: one bit an entry."""
        return {"bits": packed(self.m > self.cut)}


class Bits(Wrap):
    """``W' = V * M``, M held in bits, eight to a byte; ones until a file says otherwise."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.bits: Tensor
        self.shape = shape
        self.register_buffer("bits", packed(torch.ones(shape, dtype=torch.bool)))

    def of(self, V: Tensor) -> Tensor:
        return V.masked_fill(~unpacked(self.bits, self.shape), 0)
