"""A chain with two sets of factors: those that train, and their running mean, which answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.call import current
from ...core.site import Place
from .factor import Chain


class Interpolated(Chain):
    """Where a graph is wanted, and in training, the working factors A and B; in evaluation without
    one, in files for others and in a merged weight the long-term ones, ``A_slow <- ema A_slow +
    (1 - ema) A`` at every :meth:`follow`, B alike. Both begin as one.

    The mean is one of factors: ``E[B] E[A]`` is not ``E[B A]``, and near it while both move little.
    """

    def __init__(self, place: Place, rank: int, scale: float, dropout: float):
        super().__init__(place, rank, scale, dropout)
        self.register_buffer("A_slow", self.A.detach().clone())
        self.register_buffer("B_slow", self.B.detach().clone())

    def __getattr__(self, name: str) -> Any:
        """A and B are whichever set answers."""
        if name in ("A", "B") and f"{name}_slow" in self._buffers and self._settled():
            return self._buffers[f"{name}_slow"]
        return super().__getattr__(name)

    def _settled(self) -> bool:
        """Is this evaluation? As the forward was that is under way, also when it is run again."""
        call = current()
        graph = torch.is_grad_enabled() if call is None else call.grad
        return not (self.training or graph)

    @torch.no_grad()
    def follow(self, ema: float) -> None:
        for name in ("A", "B"):
            slow, working = self._buffers[f"{name}_slow"], self._parameters[name]
            assert slow is not None and working is not None
            slow.lerp_(working.to(slow.dtype), 1 - ema)

    def slow(self) -> tuple[Tensor, Tensor]:
        """The long-term factors, scale and all."""
        return self._buffers["A_slow"], self._buffers["B_slow"] * self.scale  # type: ignore

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.slow()

    def final(self) -> Tensor:
        A, B = self.slow()
        return B @ A
