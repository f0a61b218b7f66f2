"""A weight without its least directions, and an update in the form of triplets beside it.

    Delta = s B diag(E) A - U V        U V: the last r triplets of W = sum_i S_i u_i v_i^T
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.site import Place
from .path import Path


def least(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(U (out, r), V (r, in)) with U V the r least triplets of W (out, in)."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, -r:] * S[-r:], Vt[-r:]


class Cut(Path):
    """``Delta = -U V``: U (out, r), V (r, in), the least triplets of W, which leave it. It has
    nothing that trains, and nothing is dropped of it."""

    def __init__(self, place: Place, rank: int):
        super().__init__()
        self.inp = place.inp
        self.register_buffer("U", torch.zeros(place.out, rank))
        self.register_buffer("V", torch.zeros(rank, place.inp))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.V, -self.U

    def dense(self) -> Tensor:
        return -self.U @ self.V

    def path(self, h: Tensor) -> Tensor:
        return h @ self.V.t().to(h.dtype) @ -self.U.t().to(h.dtype)


class Graded(Path):
    """``Delta = s B diag(E) A``: A (r, in), E (r,), B (out, r)."""

    def __init__(self, place: Place, rank: int, scale: float, dropout: float):
        super().__init__()
        self.inp, self.scale, self.dropout = place.inp, scale, dropout
        self.A = nn.Parameter(torch.empty(rank, place.inp))
        nn.init.uniform_(self.A, -place.inp**-0.5, place.inp**-0.5)
        self.E = nn.Parameter(torch.randn(rank))
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        for p in self.parameters():
            p.burnish_decay = False

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * (self.E * self.scale)

    def path(self, h: Tensor) -> Tensor:
        A, B = self.pair()
        return h @ A.t().to(h.dtype) @ B.t().to(h.dtype)
