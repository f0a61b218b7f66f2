"""A state that two halves of it change in turn, and the way back.

    o1 = e1 + F(e2)     o2 = e2 + G(o1)          e2 = o2 - G(o1)     e1 = o1 - F(e2)

F and G are bottlenecks of half the width. The map has an inverse whatever they are, and keeps
volumes (its Jacobian has determinant 1). Kept for backward: the state alone; F and G run again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tape.executor import checkpoint
from .bottleneck import Bottleneck


class Coupling(nn.Module):
    """o of e (..., d), d even. F, G: d / 2 to d / 2, `width` in between."""

    def __init__(self, d: int, width: int, act: str, init: str):
        super().__init__()
        self.F, self.G = (Bottleneck(d // 2, width, act=act, init=init)     # type: ignore[arg-type]
                          for _ in range(2))

    def forward(self, e: Tensor) -> Tensor:
        return checkpoint(self, self.there, (e,), {})

    def there(self, e: Tensor) -> Tensor:
        """o of e."""
        e1, e2 = e.chunk(2, -1)
        o1 = e1 + self.F(e2)
        return torch.cat([o1, e2 + self.G(o1)], -1)

    def back(self, o: Tensor) -> Tensor:
        """e of o."""
        o1, o2 = o.chunk(2, -1)
        e2 = o2 - self.G(o1)
        return torch.cat([o1 - self.F(e2), e2], -1)

    @staticmethod
    def count(d: int, width: int) -> int:
        """Trainable numbers."""
        return 2 * Bottleneck.count(d // 2, width)


class Again(nn.Module):
    """A coupling that stands elsewhere, there or back."""

    coupling: Coupling

    def __init__(self, coupling: Coupling, back: bool):
        super().__init__()
        self.__dict__["coupling"], self.is_back = coupling, back

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another holds, for whoever runs this again in backward."""
        return tuple(self.coupling.parameters())

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.coupling.back if self.is_back else self.coupling.there,
                          (h,), {})
