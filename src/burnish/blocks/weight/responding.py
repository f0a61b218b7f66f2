"""A low-rank update that answers to the hyperparameters it is trained under."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from .pooled import OfShared


class Responding(OfShared):
    """``Delta(u) = s (B + diag(V u) R) A``: rows of B move with the hyperparameters u (n,).

    A (r, in) uniform, B (out, r) and R (out, r) zero, V (out, n) uniform. shared: `u`, of which
    every place has the one, `shift` (n,), by how much it is moved while training (None: not at
    all), and `drop`, the probability of a zero in the input in training.
    """

    def __init__(self, place: Place, rank: int, scale: float, shared: Any):
        super().__init__(place, shared, ("u",))
        n, inp = shared.u.numel(), place.inp
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, inp).uniform_(-inp**-0.5, inp**-0.5))
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.R = nn.Parameter(torch.zeros(place.out, rank))
        self.V = nn.Parameter(torch.empty(place.out, n).uniform_(-n**-0.5, n**-0.5))
        for p in self.parameters():
            p.burnish_decay = False                      # type: ignore[attr-defined]

    @property
    def dropout(self) -> float:                          # type: ignore[override]
        return float(getattr(self.shared, "drop", 0.0))

    @dropout.setter
    def dropout(self, rate: float) -> None:
        self.shared.drop = rate

    @property
    def point(self) -> Tensor:
        """u, moved where it is to be."""
        shift = getattr(self.shared, "shift", None)
        moves = self.training or getattr(self.shared, "probing", False)
        u: Tensor = self.shared.u
        return u if shift is None or not moves else u + shift.to(u)

    def at(self, u: Tensor) -> Tensor:
        """(out, r), the second factor under u."""
        return self.B + (self.V @ u.to(self.V.dtype)).unsqueeze(1) * self.R

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.at(self.point) * self.scale

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.A, self.at(self.shared.u) * self.scale

    def final(self) -> Tensor:
        A, B = self.low_rank()
        return B @ A
