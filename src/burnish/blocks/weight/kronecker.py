"""Updates that are one Kronecker product, evaluated without forming it."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn

from .path import Path


class Kronecker(Path):
    """``Delta = s C (x) B``: C (o1, i1), B (o2, i2 k); either may be a product of rank r.

    With x as (i1, i2 k): ``Delta x = s C x B^T``; on tokens neither Delta nor a full B is ever
    formed. k: entries of a convolution's kernel, 1 elsewhere. tucker: where k > 1 and B is not
    whole, ``B[c, d, k] = sum_pq U[c, p] T[p, q, k] V[q, d]``, U (o2, r), T (r, r k), V (r, i2).
    """

    def __init__(self, outer: tuple[int, int], inner: tuple[int, int], rank: int,
                 whole: tuple[bool, bool], scale: float, kernel: int, tucker: bool):
        super().__init__()
        (o1, i1), (o2, i2) = outer, inner
        self.outer, self.inner, self.scale = outer, (o2, i2 * kernel), scale
        self.inp, self.kernel = i1 * i2 * kernel, kernel
        self.tucker = tucker and kernel > 1 and not whole[1]
        self.C = _made([(o1, i1)] if whole[0] else [(o1, rank), (rank, i1)])
        self.B = _made([(o2, i2 * kernel)] if whole[1] else
                       [(o2, rank), (rank, rank * kernel), (rank, i2)] if self.tucker else
                       [(o2, rank), (rank, i2 * kernel)])
        nn.init.zeros_(self.B[-1])

    def factors(self) -> tuple[Tensor, ...]:
        """Matrices whose product is B."""
        if not self.tucker:
            return tuple(self.B)
        U, T, V = self.B
        r = V.shape[0]
        return U, torch.einsum("pqk,qd->pdk", T.view(r, r, self.kernel), V).flatten(1)

    def dense(self) -> Tensor:
        return self.scale * torch.kron(reduce(torch.matmul, self.C),
                                       reduce(torch.matmul, self.factors()))

    def path(self, h: Tensor) -> Tensor:
        z = h.view(-1, self.outer[1], self.inner[1])
        *up, last = (b.to(h.dtype) for b in self.factors())  # inputs first: r or o2 wide
        z = z @ last.t()
        for c in reversed(self.C):
            z = torch.einsum("oi,nir->nor", c.to(h.dtype), z)
        for b in up:
            z = z @ b.t()
        return z.reshape(h.shape[0], -1) * self.scale


def _made(shapes: list[tuple[int, int]]) -> nn.ParameterList:
    """Kaiming-uniform tensors without weight decay."""
    made = nn.ParameterList(nn.Parameter(torch.empty(s)) for s in shapes)
    for p in made:
        nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        p.burnish_decay = False
    return made
