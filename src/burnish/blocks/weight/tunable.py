"""A weight that is a combination of several, by coefficients that are set from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from .term import Term


class Tunable(Term):
    """``Delta(w) = s sum_i w_i B_i A_i``, A (p, r, in) uniform and B (p, out, r) zero; with
    ``rank=0`` ``sum_i w_i K_i``, K (p, out, in) zero.

    shared: whose `omega` (p,) are the coefficients, one vector for all places.
    """

    def __init__(self, place: Place, rank: int, scale: float, shared: Any):
        super().__init__()
        self.scale = scale
        self.__dict__["shared"] = shared                 # the root owns it
        p = shared.omega.numel()
        if rank:
            self.A = nn.Parameter(torch.empty(p, rank, place.inp).uniform_(-place.inp**-0.5,
                                                                           place.inp**-0.5))
            self.B = nn.Parameter(torch.zeros(p, place.out, rank))
        else:
            self.K = nn.Parameter(torch.zeros(p, place.out, place.inp))
        self.whole = not rank
        for t in self.parameters():
            t.burnish_decay = False

    def dense(self) -> Tensor:
        w = self.shared.omega
        if self.whole:
            return torch.einsum("p,poi->oi", w.to(self.K.dtype), self.K)
        return self.scale * torch.einsum("p,por,pri->oi", w.to(self.A.dtype), self.B, self.A)
