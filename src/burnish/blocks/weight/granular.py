"""Low-rank updates block by block: every pair of a run of inputs and a run of outputs has its own
thin product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .path import Path


class Granular(Path):
    """Block (j, n) of ``Delta`` is ``s B_jn A_nj``, j of k runs of outputs, n of k runs of inputs.

    A (k, in / k, r): of the run n, columns ``j r / k`` on are A_nj transposed. B (k, r, out / k):
    of the run j, rows ``n r / k`` on are B_jn transposed. rest: rank of a plain pair beside them,
    A_rest (rest, in), B_rest (out, rest), under the same s.
    """

    def __init__(self, out: int, inp: int, rank: int, grid: int, rest: int, scale: float,
                 dropout: float):
        super().__init__()
        self.inp, self.cells, self.scale, self.dropout = inp, grid, scale, dropout
        edge = (grid / inp)**0.5
        self.A = nn.Parameter(torch.empty(grid, inp // grid, rank).uniform_(-edge, edge))
        self.B = nn.Parameter(torch.zeros(grid, rank, out // grid))
        self.A_rest: nn.Parameter | None
        self.B_rest: nn.Parameter | None
        self.register_parameter("A_rest", None)
        self.register_parameter("B_rest", None)
        if rest:
            edge = inp**-0.5
            self.A_rest = nn.Parameter(torch.empty(rest, inp).uniform_(-edge, edge))
            self.B_rest = nn.Parameter(torch.zeros(out, rest))
        for p in self.parameters():
            p.burnish_decay = False                      # type: ignore[attr-defined]

    def path(self, h: Tensor) -> Tensor:
        k, dtype = self.cells, h.dtype
        runs = h.unflatten(1, (k, -1)).transpose(0, 1)                  # (n, N, in / k)
        seen = (runs @ self.A.to(dtype)).unflatten(-1, (k, -1))          # (n, N, j, r / k)
        told = seen.permute(2, 1, 0, 3).flatten(2)                       # (j, N, n r / k)
        y = (told @ (self.B * self.scale).to(dtype)).transpose(0, 1).flatten(1)
        if self.A_rest is None or self.B_rest is None:
            return y
        return y + h @ self.A_rest.t().to(dtype) @ (self.B_rest * self.scale).t().to(dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """One pair of rank k r (and the rest): a row for each column of each A_n."""
        k, r = self.cells, self.A.shape[2]
        A = torch.block_diag(*self.A.transpose(1, 2))                    # (k r, in)
        # row (n, j, c) of it goes to the outputs of j: B's rows (j, n, c)
        B = self.B.view(k, k, r // k, -1) * self.scale                   # (j, n, c, out / k)
        B = torch.einsum("jnco,jm->jonmc", B, B.new_ones(k).diag()).flatten(2).flatten(0, 1)
        if self.A_rest is None or self.B_rest is None:
            return A, B
        return torch.cat([A, self.A_rest]), torch.cat([B, self.B_rest * self.scale], 1)
