"""Updates generated column by column: the forward says all, a panel's gradient is made from it.

A method gives ``columns(i0, i1)``, built of ordinary differentiable operations on its own small
tensors; no gradient is written by hand. Forward makes the columns a panel at a time, under no
graph; backward makes each panel again under a graph of its own, which lives as long as the panel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dropped import Dropping


class Columns(Dropping):
    """``Delta[:, i0:i1] = columns(i0, i1)``. Subclasses give :meth:`columns` and `inp`."""

    tiled = True
    inp: int

    def columns(self, i0: int, i1: int) -> Tensor:
        """Columns i0:i1 of the update, (out, i1 - i0): a fresh tensor, differentiable in theta."""
        raise NotImplementedError

    def panel(self, i0: int, i1: int) -> Tensor:
        return self.columns(i0, i1)

    def dense(self) -> Tensor:
        return self.columns(0, self.inp)

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        with torch.no_grad():
            return self.columns(i0, i1)

