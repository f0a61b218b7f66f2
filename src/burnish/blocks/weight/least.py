"""A weight without its least directions, and an update in the form of triplets beside it.

    Delta = s B diag(E) A - U V        U V: the last r triplets of W = sum_i S_i u_i v_i^T
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.site import Place
from .paired import Paired


def least(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(U (out, r), V (r, in)) with U V the r least triplets of W (out, in)."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, -r:] * S[-r:], Vt[-r:]


class Cut(Paired):
    """``Delta = -U V``: U (out, r), V (r, in), the least triplets of W, which leave it. It has
    nothing that trains, and nothing is dropped of it."""

    def __init__(self, place: Place, rank: int):
        super().__init__()
        self.register_buffer("U", torch.zeros(place.out, rank))
        self.register_buffer("V", torch.zeros(rank, place.inp))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.V, -self.U


class Graded(Paired):
    """``Delta = s B diag(E) A``: A (r, in), E (r,), B (out, r)."""

    def __init__(self, place: Place, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, place.inp))
        nn.init.uniform_(self.A, -place.inp**-0.5, place.inp**-0.5)
        self.E = nn.Parameter(torch.randn(rank))
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        for p in self.parameters():
            p.burnish_decay = False

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * (self.E * self.scale)
