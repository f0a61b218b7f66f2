"""Updates in singular-value form whose beginning leaves the base (see start.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.site import Place
from .paired import Paired


class LessTriplets(Paired):
    """``Delta = s (P diag(E) Q - P0 diag(E0) Q0)``: P (out, r), E (r,), Q (r, in) train.

    With C = P diag(E) it runs as ``s ((C - C0) Q + C0 (Q - Q0))``: exactly nothing at the start, in
    any precision. C0, Q0 are buffers, in the file.
    """

    def __init__(self, place: Place, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.P = nn.Parameter(torch.zeros(place.out, rank))
        self.E = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.zeros(rank, place.inp))
        self.register_buffer("C0", torch.zeros(place.out, rank))
        self.register_buffer("Q0", torch.zeros(rank, place.inp))
        for p in self.parameters():
            p.burnish_decay = False

    @torch.no_grad()
    def begin(self, P: Tensor, E: Tensor, Q: Tensor) -> None:
        for there, value in ((self.P, P), (self.E, E), (self.Q, Q), (self.C0, P * E),
                             (self.Q0, Q)):
            there.copy_(value)

    def pair(self) -> tuple[Tensor, Tensor]:
        C = self.P * self.E
        return (torch.cat([self.Q, self.Q - self.Q0]),
                torch.cat([C - self.C0, self.C0], 1) * self.scale)
