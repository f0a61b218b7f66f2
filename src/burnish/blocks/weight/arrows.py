"""Low-rank updates of one linear that tokens choose among by the direction each reads most.

    c_n = |v_n . x|     v_n (I,) the leading right singular vector of B_n A_n
    w   = softmax of the k largest c_n / temperature, 0 elsewhere
    y   = s sum_n w_n B_n A_n x

Nothing of the choice is trained: it is read off the updates. The updates side by side are one
product down and one up. Kept for backward: x; the rest is made again there. Letters: I in, O out,
N experts, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tape.executor import checkpoint
from .experts import spread

Rows = tuple[tuple[int, int], ...] | None


def direction(A: Tensor, B: Tensor) -> Tensor:
    """The leading right singular vector of B A, (I,), of A (R, I) and B (O, R)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    Q, T = torch.linalg.qr(A.to(wide).t())                   # A = T^t Q^t
    _, _, right = torch.linalg.svd(B.to(wide) @ T.t(), full_matrices=False)
    return (Q @ right[0]).to(A.dtype)


class Arrows(nn.Module):
    """A (N, R, I), B (N, O, R) zero: nothing at the start; V (N, I), a buffer, unit directions that
    are drawn until :meth:`take` reads them off updates. rows: runs of outputs that it adds to where
    the linear is fused."""

    def __init__(self, inp: int, out: int, experts: int, rank: int, k: int, temperature: float,
                 scale: float, rows: Rows = None):
        super().__init__()
        self.out, self.rows, self.k = out, rows, k
        self.temperature, self.scale = temperature, scale
        n, bound = out if rows is None else sum(b - a for a, b in rows), 1 / math.sqrt(inp)
        self.A = nn.Parameter(torch.empty(experts, rank, inp).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(experts, n, rank))
        self.register_buffer("V", F.normalize(torch.randn(experts, inp), dim=1))
        self.A.burnish_decay = self.B.burnish_decay = False

    @torch.no_grad()
    def take(self, updates: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Become these: A (R or fewer, I), B (O, R or fewer) and the scale of each."""
        for n, (A, B, scale) in enumerate(updates):
            R = A.shape[0]
            self.A[n], self.B[n] = 0, 0
            self.A[n, :R] = A
            self.B[n, :, :R] = B * (scale / self.scale)
            self.V[n] = direction(A, B)

    def weights(self, x: Tensor) -> Tensor:
        """Of the experts, (..., N)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        fit = F.linear(x.to(wide), self.V.to(wide)).abs()
        top, at = fit.topk(self.k, -1)
        return torch.zeros_like(fit).scatter(-1, at, (top / self.temperature).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The update itself, (..., O) or as many outputs as `rows` say."""
        N, R, _ = self.A.shape
        z = F.linear(x, self.A.flatten(0, 1).to(x.dtype)).unflatten(-1, (N, R))
        z = z * (self.weights(x) * self.scale).unsqueeze(-1).to(z.dtype)
        return F.linear(z.flatten(-2), self.B.transpose(0, 1).flatten(1).to(z.dtype))
