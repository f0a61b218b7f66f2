"""Rotations of the inputs of a weight, block by block (see turn.py for how they run)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .turn import Turn


class Rotation(Turn):
    """``x -> x blockdiag(R_1 .. R_k)``, ``R_j = (I + Q_j)(I - Q_j)^-1``, Q_j skew, (b, b).

    upper (k, b (b - 1) / 2): the entries of Q above the diagonal, row by row; k = 1 when shared.
    Realised as x + x M with ``M = R - I = 2 Q (I - Q)^-1``: exactly x at Q = 0, and a small turn is
    not lost beside the identity in half precision.
    """

    def __init__(self, inp: int, block: int, share: bool, terms: int):
        super().__init__()
        blocks = 1 if share else inp // block
        self.upper = nn.Parameter(torch.zeros(blocks, block * (block - 1) // 2))
        self.block, self.terms = block, terms

    def skew(self) -> Tensor:
        """Q: (k, b, b)."""
        i, j = torch.triu_indices(self.block, self.block, 1, device=self.upper.device)
        Q = self.upper.new_zeros(self.upper.shape[0], self.block, self.block)
        Q = Q.index_put((torch.arange(Q.shape[0], device=Q.device)[:, None], i, j), self.upper)
        return Q - Q.transpose(-1, -2)

    def move(self) -> Tensor:
        """R - I: (k, b, b), by a solve, or by `terms` terms of its series in Q."""
        Q = self.skew()
        if not self.terms:
            eye = torch.eye(self.block, dtype=Q.dtype, device=Q.device)
            return torch.linalg.solve(eye - Q, 2 * Q)           # the two commute
        power, M = Q, torch.zeros_like(Q)
        for n in range(1, self.terms):           # 2 Q + 2 Q^2 + ... + Q^(terms - 1)
            M = M + (2 if n < self.terms - 1 else 1) * power
            power = power @ Q
        return M

    def _turned(self, rows: Tensor, M: Tensor) -> Tensor:
        cut = rows.reshape(rows.shape[0], -1, self.block).transpose(0, 1)
        made = cut @ M.to(rows.dtype).expand(cut.shape[0], -1, -1)
        return rows + made.transpose(0, 1).reshape(rows.shape)

    own = move

    def before(self, x_NI: Tensor, own: Tensor) -> Tensor:
        return self._turned(x_NI, own)

    def of(self, V: Tensor) -> Tensor:
        return self._turned(V, self.move().transpose(-1, -2))


@dataclass(frozen=True)
class Near:
    """After every update Q_j is brought back into its ball: ``||Q_j||_F <= bound``."""

    terms: list[Rotation]
    bound: float

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for t in self.terms:
            norm = torch.linalg.vector_norm(t.upper, dim=1, keepdim=True) * 2**0.5
            t.upper.mul_(self.bound / norm.clamp_min(self.bound))
