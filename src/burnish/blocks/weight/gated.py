"""A low-rank update behind a gate that trains, until it is told whether to stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.site import Place
from .paired import Paired


class Gated(Paired):
    """``Delta = 2 sigmoid(gate) s B A``: A (r, in), B (out, r), gate one number that starts at 0.

    Without the gate (no entries) it is ``s B A``; of rank 0 it is nothing, at no cost. block: where
    it competes, for whoever decides. Backward keeps x; the path runs again there.
    """

    ranked: ClassVar[dict[str, int]] = {"A": 0, "B": 1, "gate": 0}

    def __init__(self, place: Place, rank: int, scale: float, gates: int = 1):
        super().__init__()
        self.inp, self.out, self.scale, self.block = place.inp, place.out, scale, place.block
        self.A = nn.Parameter(torch.empty(rank, place.inp))
        self.A.data.uniform_(-place.inp**-0.5, place.inp**-0.5)
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.gate = nn.Parameter(torch.zeros(gates))
        for p in self.parameters():
            p.burnish_decay = False                  # type: ignore[attr-defined]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def decided(self) -> bool:
        return not self.gate.numel()

    @property
    def keeps_input(self) -> bool:
        return self.rank > 0 and super().keeps_input

    def settled(self) -> dict[str, int]:
        return {"rank": self.rank, "gates": self.gate.numel()}

    def fresh(self, rank: int, drawn: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Factors as at the start; ``drawn(*shape)`` is uniform between -1 and 1."""
        return {"A": drawn(rank, self.inp) * self.inp**-0.5, "B": torch.zeros(self.out, rank)}

    def pair(self) -> tuple[Tensor, Tensor]:
        gate = 1.0 if self.decided else 2 * self.gate.sigmoid()
        return self.A, self.B * (gate * self.scale)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        return super().forward_(x_NI, y_NO, scale) if self.rank else ()

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        if kept:
            grads = super().backward_(g_NO, x_NI, kept, dx_NI, scale)
        else:
            grads = [None] * len(self.theta())
        return [torch.zeros_like(t) if g is None and t.requires_grad else g
                for g, t in zip(grads, self.theta(), strict=True)]
