"""A basis that the weights of one kind have in common, and an update within it.

    W_l = U_l diag(lambda_l) V^T,    Delta_l = U_l (diag(z_l - lambda_l) + S_l) V^T

V (in, in) is one for all; the columns of U_l (out, in) have length 1. Letters: N tokens, I in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .path import Path


@torch.no_grad()
def basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """V of these matrices (O_l, I), in the precision they have.

    ``[W_1; W_2; ..] = Q R`` and ``V = R^T E``, E the eigenvectors of the mean of the
    ``(Q_l^T Q_l + ridge I)^-1``, the smallest value first. Where all rows together are fewer than
    the inputs V is their right singular vectors, the largest value first.
    """
    whole = torch.cat(list(weights))
    if whole.shape[0] < whole.shape[1]:
        return torch.linalg.svd(whole).Vh.t()
    Q, R = torch.linalg.qr(whole)
    eye = torch.eye(len(R), dtype=R.dtype)
    parts = [torch.linalg.inv(q.t() @ q + ridge * eye)
             for q in Q.split([len(W) for W in weights])]
    return R.t() @ torch.linalg.eigh(sum(parts[1:], parts[0]) / len(parts)).eigenvectors


@torch.no_grad()
def within(V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """(U (O, I), lambda (I,)) with ``W = U diag(lambda) V^T``; a direction W has nothing of is 0 in
    both."""
    B = torch.linalg.solve(V.double(), W.double().t()).t()
    size = torch.linalg.vector_norm(B, dim=0)
    return torch.where(size > 1e-12, B / size.clamp_min(1e-12), 0.0), size


def off_diagonal(n: int, density: float, generator: torch.Generator) -> Tensor:
    """Entries of an (n, n) matrix beside its diagonal, as flat positions: a share of n^2, at least
    one, in the order in which they are drawn."""
    drawn = torch.randperm(n * (n - 1), generator=generator, device="cpu")[: entries(n, density)]
    row, column = drawn // max(1, n - 1), drawn % max(1, n - 1)
    return row * n + column + (column >= row)


def entries(n: int, density: float) -> int:
    return min(max(1, int(n * n * density)), n * (n - 1))


class Joint(Path):
    """``Delta = L (diag(z - z0) + S) V^T``: z (I,) begins at z0, S (I, I) has `values` at the
    flat positions ``shared.index_<name>``; V is ``shared.V_<name>``."""

    def __init__(self, out: int, inp: int, entries: int, shared: Any, name: str):
        super().__init__()
        self.inp, self.name = inp, name
        self.register_buffer("L", torch.zeros(out, inp))
        self.register_buffer("z0", torch.zeros(inp))
        self.z, self.values = nn.Parameter(torch.zeros(inp)), nn.Parameter(torch.zeros(entries))
        for p in self.parameters():
            p.burnish_decay = False
        self.__dict__["shared"] = shared         # the root owns it

    @property
    def V(self) -> Tensor:
        return getattr(self.shared, f"V_{self.name}")

    @property
    def into(self) -> Tensor:
        return self.V.t()

    @torch.no_grad()
    def read(self, W: Tensor) -> None:
        """Begin at this weight."""
        U, size = within(self.V.to(W.device), W)
        self.L.copy_(U), self.z0.copy_(size), self.z.copy_(size)

    def matrix(self) -> Tensor:
        """S: (I, I)."""
        index = getattr(self.shared, f"index_{self.name}")
        S = self.values.new_zeros(self.inp**2).index_put((index,), self.values)
        return S.view(self.inp, self.inp)

    def path(self, h: Tensor) -> Tensor:
        moved = h * (self.z - self.z0).to(h.dtype) + h @ self.matrix().t().to(h.dtype)
        return moved @ self.L.t().to(h.dtype)
