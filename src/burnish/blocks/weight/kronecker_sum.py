"""Updates that are a sum of Kronecker products which begins in the weight itself (see start.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.site import Place
from .path import Path


def rearranged(W: Tensor, outer: tuple[int, int]) -> Tensor:
    """R(W) (m1 n1, m2 n2) of W (m1 m2, n1 n2), outer = (m1, n1): row (i, j) is block (i, j) of W,
    (m2, n2), read row by row. Then ``R(A (x) B) = vec(A) vec(B)^T``: sums of Kronecker products are
    matrices of low rank there (Van Loan and Pitsianis)."""
    m, n = outer
    blocks = W.reshape(m, W.shape[0] // m, n, W.shape[1] // n)
    return blocks.transpose(1, 2).reshape(m * n, -1)


class LessKronecker(Path):
    """``Delta = sum_k sigma_k A_k (x) B_k`` less its start: (r, m1, n1), (r,) and (r, m2, n2).

    With C = sigma A it runs as ``(C - C0) (x) B + C0 (x) (B - B0)``: exactly nothing at the start,
    in any precision. x is read as (n1, n2): ``C X B^T``, so that no product is formed. C0, B0 are
    buffers, in the file; where a storage holds W less its start, nothing is subtracted here.
    """

    def __init__(self, rank: int, outer: tuple[int, int], inner: tuple[int, int]):
        super().__init__()
        self.outer, self.inner, self.inp = outer, inner, outer[1] * inner[1]
        self.A = nn.Parameter(torch.zeros(rank, *outer))
        self.sigma = nn.Parameter(torch.zeros(rank))
        self.B = nn.Parameter(torch.zeros(rank, *inner))
        self.register_buffer("C0", torch.zeros(rank, *outer))
        self.register_buffer("B0", torch.zeros(rank, *inner))
        self.folded = False                      # does a storage hold the residual?
        for p in self.parameters():
            p.burnish_decay = False

    @torch.no_grad()
    def begin(self, U: Tensor, S: Tensor, Vt: Tensor) -> None:
        """Start at the terms of a decomposition of R(W)."""
        self.A.copy_(U.t().view_as(self.A))
        self.sigma.copy_(S)
        self.B.copy_(Vt.view_as(self.B))
        self.C0.copy_(self.scaled())
        self.B0.copy_(self.B)

    def scaled(self) -> Tensor:
        """C: (r, m1, n1)."""
        return self.A * self.sigma.view(-1, 1, 1)

    def products(self) -> tuple[Tensor, Tensor]:
        """Two stacks whose Kronecker products add up to the update."""
        C = self.scaled()
        if self.folded:
            return C, self.B
        return torch.cat([C - self.C0, self.C0]), torch.cat([self.B, self.B - self.B0])

    def dense(self) -> Tensor:
        return self.matrix(*self.products())

    def matrix(self, C: Tensor, B: Tensor) -> Tensor:
        (m1, n1), (m2, n2) = self.outer, self.inner
        blocks = (C.flatten(1).t() @ B.flatten(1)).view(m1, n1, m2, n2)
        return blocks.transpose(1, 2).reshape(m1 * m2, self.inp)

    def path(self, h: Tensor) -> Tensor:
        X = h.view(-1, self.outer[1], self.inner[1])
        C, B = (t.to(h.dtype) for t in self.products())
        y = h.new_zeros(h.shape[0], self.outer[0], self.inner[0])
        for c, b in zip(C, B, strict=True):      # one (n1, m2) per token at a time
            y = y + torch.einsum("ab,nbc->nac", c, X @ b.t())
        return y.flatten(1)

    # -- a start that a storage absorbs ---------------------------------------------------------
    def start(self) -> Tensor:
        """What a storage has absorbed, (out, in)."""
        return self.matrix(self.C0, self.B0)

    def fold_start(self, stored: Tensor, place: Place) -> Tensor:
        """The stored weight minus the start, product by product in a fixed order."""
        out = stored.clone()
        view = place.view(out)
        left = view.to(self.C0.dtype).clone()
        for c, b in zip(self.C0, self.B0, strict=True):
            left -= self.matrix(c.unsqueeze(0), b.unsqueeze(0))
        view.copy_(left)
        return place.unview(view, out)

    def absorbed(self) -> None:
        """A storage holds the residual now: nothing is left to subtract."""
        self.folded = True
