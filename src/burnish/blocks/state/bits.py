"""A bottleneck whose two matrices answer in a few bits: trained (latent.py), or as a file has them.

    f(h) = s Q(W_up) drop(act(Q(W_down) h))
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...core.errors import RecipeError
from ..weight.latent import Latent, Stored, reference
from .bottleneck import Bottleneck, activation


class BitBottleneck(Bottleneck):
    """down (R, D), up (D, R), without biases; down Kaiming-uniform, up truncated normal of 1e-3.

    stored: codes of a file, which do not train; RecipeError where no file gives them.
    """

    def __init__(self, d: int, width: int, bits: int, *, stored: bool = False, **bottleneck: Any):
        super().__init__(d, width, bias=False, **bottleneck)
        down = Stored(width, d, bits) if stored else Latent(width, d, bits)
        up = Stored(d, width, bits) if stored else Latent(d, width, bits, std=1e-3)
        self.down, self.up = down, up                       # type: ignore[assignment]

    def sides(self) -> tuple[Tensor, None, Tensor, None]:
        return self.down.matrix(), None, self.up.matrix(), None

    def dense(self, h: Tensor) -> Tensor:
        A, B = (reference(m.weight, m.bits) if isinstance(m, Latent) else m.matrix()
                for m in (self.down, self.up))
        return self.scale * F.linear(activation(self.act)(F.linear(h, A)), B)

    def attached(self, attacher: Any) -> None:
        """Told that it is in its place."""
        if isinstance(self.down, Stored) and not attacher.adapter.filled:
            raise RecipeError("stored=True has the codes of a saved adapter; leave it out to train "
                              "new ones")


