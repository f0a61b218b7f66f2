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

    block_dropout: the share of the blocks of one factor that do not turn in a forward; which ones
    is drawn, and so is whether a broken part of a block counts. A single block always turns.
    """

    factors = 1
    block_dropout = 0.0

    def __init__(self, inp: int, block: int, share: bool, terms: int):
        super().__init__()
        blocks = 1 if share else inp // block
        self.upper = nn.Parameter(torch.zeros(blocks, block * (block - 1) // 2))
        self.block, self.terms = block, terms

    def draw(self) -> Tensor | None:
        """(k, 1): 0 for the blocks that stay where they are, else 1."""
        k = self.upper.shape[0] // self.factors
        if not (self.training and self.block_dropout) or k == 1:
            return None
        device = self.upper.device
        still = int(self.block_dropout * k + torch.rand(()).item())
        turns = self.upper.new_ones(self.factors, k)
        which = int(torch.randint(self.factors, ()))
        turns[which, torch.randperm(k, device=device)[:still]] = 0
        return turns.view(-1, 1)

    def skew(self, turns: Tensor | None = None) -> Tensor:
        """Q: (k, b, b)."""
        return skew(self.upper if turns is None else self.upper * turns, self.block)

    def move(self, turns: Tensor | None = None) -> Tensor:
        """R - I: (k, b, b)."""
        return cayley(self.skew(turns), self.terms)

    own = move

    def before(self, x_NI: Tensor, own: Tensor) -> Tensor:
        return turned(x_NI, own)

    def pull(self, x_NI: Tensor, g_NI: Tensor, own: Tensor, need_x: bool,     # type: ignore
             need_own: bool) -> tuple[Tensor | None, Tensor | None]:
        dx = turned(g_NI, own.transpose(-1, -2)) if need_x else None
        return dx, blocks(x_NI, g_NI, own.shape).to(own.dtype) if need_own else None

    def of(self, V: Tensor) -> Tensor:
        return turned(V, self.move().transpose(-1, -2))


def turned(rows: Tensor, M: Tensor) -> Tensor:
    """``rows (I + blockdiag(M))``, M (k, b, b), or (1, b, b) for all blocks."""
    if rows.element_size() < 4:                  # I + M would lose what is small in M
        return rows + added(rows, M)
    return added(rows, M.to(rows.dtype) + torch.eye(M.shape[-1], dtype=rows.dtype,
                                                    device=M.device))


def added(rows: Tensor, M: Tensor) -> Tensor:
    """``rows blockdiag(M)``."""
    M, cut = M.to(rows.dtype), rows.unflatten(-1, (-1, M.shape[-1]))
    made = cut @ M[0] if len(M) == 1 else torch.einsum("nkb,kbc->nkc", cut, M)
    return made.reshape(rows.shape)


def blocks(x: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of ``x blockdiag(M)`` for M of this shape."""
    x, g = (t.unflatten(-1, (-1, shape[-1])) for t in (x, g))
    if shape[0] == 1:
        return (x.flatten(0, 1).t() @ g.flatten(0, 1)).unsqueeze(0)
    return torch.einsum("nkb,nkc->kbc", x, g)


def skew(upper: Tensor, block: int) -> Tensor:
    """Q (k, b, b) of its entries above the diagonal, row by row: (k, b (b - 1) / 2)."""
    i, j = torch.triu_indices(block, block, 1, device=upper.device)
    Q = upper.new_zeros(upper.shape[0], block, block)
    Q = Q.index_put((torch.arange(Q.shape[0], device=Q.device)[:, None], i, j), upper)
    return Q - Q.transpose(-1, -2)


def cayley(Q: Tensor, terms: int) -> Tensor:
    """``(I + Q)(I - Q)^-1 - I`` by a solve, or by `terms` terms of its series in Q; in fp32 at
    least, for nobody solves in half precision."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    if not terms:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(eye - Q, 2 * Q)               # the two commute
    power, M = Q, torch.zeros_like(Q)
    for n in range(1, terms):                    # 2 Q + 2 Q^2 + ... + Q^(terms - 1)
        M = M + (2 if n < terms - 1 else 1) * power
        power = power @ Q
    return M


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
