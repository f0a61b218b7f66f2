"""A chain that rests in some passes of training, and answers by its mean afterwards.

    training    W + z s B A     z = 0 with probability p, else 1; whoever makes the pass draws z
    otherwise   W + (1 - p) s B A
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.site import Place
from ..choose.observe import Statistic, wide
from .factor import Chain


class Thinned(Chain):
    """A N(0, 0.02^2), B zero: identity at the start. rest: p."""

    def __init__(self, place: Place, rank: int, scale: float, rest: float):
        self.__dict__["full"], self.__dict__["rest"] = scale, rest
        super().__init__(place, rank, scale)
        torch.nn.init.normal_(self.A, std=0.02)

    @property
    def scale(self) -> float:
        return self.full * (1.0 if self.training else 1 - self.rest)

    @scale.setter
    def scale(self, value: float) -> None:
        self.__dict__["full"] = value

    def final(self) -> Tensor:
        """What answers, whatever the mode."""
        return (self.B @ self.A) * (self.full * (1 - self.rest))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * (self.full * (1 - self.rest))


class FactorGradient(Statistic):
    """Of a chain with B = 0 and this A: the mean over batches of ``mean(X^2)``, ``X = s G A^T A``
    (dL/dB times A, G = dL/dW), or ``X = W * s G A^T A`` with `weighted`: one number a place.

    It holds W itself, no copy, and a row of A's at a time is not kept: nbytes is that of A.
    """

    reads = "gradient"

    def __init__(self, A: Tensor, scale: float, weighted: bool):
        self.A, self.scale, self.weighted = A, scale, weighted
        self.W: Tensor | None = None
        self.total, self.count = 0.0, 0

    @property
    def key(self) -> Any:
        return id(self)

    @property
    def nbytes(self) -> int:
        return self.A.nbytes

    def weigh(self, W: Tensor) -> None:
        if self.weighted:
            self.W = W

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        G = wide(x)
        A = self.A.to(G)
        X = (G @ A.t()) @ A * self.scale
        if self.W is not None:
            X = X * self.W.to(G)
        self.total += float(X.square().mean())
        self.count += 1

    @property
    def value(self) -> float:
        """The importance."""
        return self.total / max(1, self.count)
