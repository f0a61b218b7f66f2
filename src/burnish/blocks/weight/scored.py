"""The importance of an update as a whole, read where its gradient passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .term import Term


class Scored(Term):
    """A term that adds ``sum |Delta * dL/dDelta|`` to `score` in each backward while `scoring`.

    The gradient of Delta is formed a run of inputs at a time, as many operations as a full one and
    nothing of its size. A term that does not train at the time (its block rests) is not scored.
    """

    #: entries of the gradient at once
    at_once: int = 1 << 22

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.scoring = False
        self.score: Tensor | float = 0.0

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: Any, dx_NI: Tensor | None,
                  scale: float) -> list[Tensor | None]:
        if self.scoring and x_NI is not None:        # one that rests just now keeps none
            step = max(1, self.at_once // g_NO.shape[1])
            for i in range(0, x_NI.shape[1], step):
                j = min(i + step, x_NI.shape[1])
                self._add(i, j, (g_NO.t() @ x_NI[:, i:j]).mul_(scale))
        return super().backward_(g_NO, x_NI, kept, dx_NI, scale)

    def pull(self, i0: int, i1: int, G: Tensor, state: Any, grads: list[Tensor | None]) -> Tensor:
        if self.scoring:
            self._add(i0, i1, G)
        return super().pull(i0, i1, G, state, grads)

    @torch.no_grad()
    def _add(self, i0: int, i1: int, G: Tensor) -> None:
        delta = self.tile(i0, i1, None)
        self.score = self.score + (delta * G.to(delta.dtype)).abs().sum()
