"""Chains of block rotations whose blocks lie ever further apart (see rotation.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backward import Pull
from .rotation import Rotation, added, turned

#: inputs that one block may join
WIDE = 64


class Butterfly(Rotation):
    """``x -> x F_m .. F_1``, ``F_i = P_i blockdiag(R_i1 .. R_ik) P_i^T``, R as in `Rotation`.

    P_i deals half-blocks of b / 2 neighbours: within runs of 2^i blocks, the even half-blocks come
    first, then the odd ones, so that a block of F_i joins inputs that lie 2^(i-1) b apart. P_1 is
    the identity: with one factor this is OFT. upper (m k, b (b - 1) / 2), factor by factor.
    """

    def __init__(self, inp: int, block: int, factors: int, terms: int):
        super().__init__(inp * factors, block, False, terms)
        self.factors = factors

    @property
    def run(self) -> int:
        """Inputs that all factors together join."""
        return self.block * 2 ** (self.factors - 1)

    @property
    def as_one(self) -> bool:
        """Do the factors run as one, blocks (run, run), which costs less than dealing out tokens
        before and behind each?"""
        return self.run <= WIDE

    def own(self, drawn: Tensor | None = None) -> Tensor:        # type: ignore[override]
        """R - I of all factors: by runs (in / run, run, run), or factor by factor."""
        M = self.move(drawn)
        if not self.as_one:
            return M
        parts, inp = M.chunk(self.factors), len(M) // self.factors * self.block
        eye = torch.eye(self.run, dtype=M.dtype, device=M.device).repeat(1, inp // self.run)
        D = torch.zeros_like(eye)                # the turn alone, never lost beside the identity
        for i in reversed(range(self.factors)):
            D = D + self._added(D, parts[i], i) + self._added(eye, parts[i], i)
        return D.view(self.run, -1, self.run).transpose(0, 1)

    @property
    def pull(self) -> Pull | None:                               # type: ignore[override]
        return super().pull if self.as_one else None

    def before(self, x_NI: Tensor, own: Tensor) -> Tensor:
        if self.as_one:
            return turned(x_NI, own)
        rows = x_NI.to(own.dtype)               # rounded once, not behind every factor
        for i in reversed(range(self.factors)):
            rows = rows + self._added(rows, own.chunk(self.factors)[i], i)
        return rows.to(x_NI.dtype)

    def of(self, V: Tensor) -> Tensor:
        """V (x -> its turned x)^T = V F_1^T .. F_m^T: rows of V pass the transposed factors."""
        M = self.move().transpose(-1, -2)
        for i in range(self.factors):
            V = V + self._added(V, M.chunk(self.factors)[i], i)
        return V

    def _added(self, rows: Tensor, M: Tensor, i: int) -> Tensor:
        """``rows P blockdiag(M) P^T``."""
        if not i:
            return added(rows, M)
        return self._deal(added(self._deal(rows, 2, 2**i), M), 2**i, 2)

    def _deal(self, rows: Tensor, piles: int, cards: int) -> Tensor:
        """Half-blocks of every run, seen as (piles, cards), told card by card."""
        cut = rows.reshape(rows.shape[0], -1, piles, cards, self.block // 2)
        return cut.transpose(2, 3).reshape(rows.shape)


class Gained(Butterfly):
    """A butterfly whose outputs have a gain: ``W' = diag(s) V R^T``; s (out,) starts at one.

    The gain stands behind the product, which backward makes again (see turn.py).
    """

    def __init__(self, out: int, inp: int, block: int, factors: int, terms: int):
        super().__init__(inp, block, factors, terms)
        self.s = nn.Parameter(torch.ones(out))
        self.s.burnish_decay = False

    def own(self, drawn: Tensor | None = None       # type: ignore[override]
            ) -> tuple[Tensor, Tensor]:
        return super().own(drawn), self.s

    def before(self, x_NI: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:   # type: ignore[override]
        return super().before(x_NI, own[0])

    def after(self, y_NO: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        return y_NO * own[1].to(y_NO.dtype)

    def of(self, V: Tensor) -> Tensor:
        return self.s.to(V.dtype)[:, None] * super().of(V)
