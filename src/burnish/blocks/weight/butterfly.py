"""Chains of block rotations whose blocks lie ever further apart (see rotation.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rotation import Rotation


class Butterfly(Rotation):
    """``x -> x F_m .. F_1``, ``F_i = P_i blockdiag(R_i1 .. R_ik) P_i^T``, R as in `Rotation`.

    P_i deals half-blocks of b / 2 neighbours: within runs of 2^i blocks, the even half-blocks come
    first, then the odd ones, so that a block of F_i joins inputs that lie 2^(i-1) b apart. P_1 is
    the identity: with one factor this is OFT. upper (m k, b (b - 1) / 2), factor by factor.
    """

    def __init__(self, inp: int, block: int, factors: int, terms: int):
        super().__init__(inp * factors, block, False, terms)
        self.factors = factors

    def before(self, x_NI: Tensor, own: Tensor) -> Tensor:
        rows = x_NI.to(own.dtype)               # rounded once, not behind every factor
        for i in reversed(range(self.factors)):
            rows = self._factor(rows, own.chunk(self.factors)[i], i)
        return rows.to(x_NI.dtype)

    def of(self, V: Tensor) -> Tensor:
        """V (x -> its turned x)^T = V F_1^T .. F_m^T: rows of V pass the transposed factors."""
        M = self.move().transpose(-1, -2)
        for i in range(self.factors):
            V = self._factor(V, M.chunk(self.factors)[i], i)
        return V

    def _factor(self, rows: Tensor, M: Tensor, i: int) -> Tensor:
        """``rows P (I + blockdiag(M)) P^T``."""
        if not i:
            return self._turned(rows, M)
        return self._deal(self._turned(self._deal(rows, 2, 2**i), M), 2**i, 2)

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
        return self.move(drawn), self.s

    def before(self, x_NI: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:   # type: ignore[override]
        return super().before(x_NI, own[0])

    def after(self, y_NO: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        return y_NO * own[1].to(y_NO.dtype)

    def of(self, V: Tensor) -> Tensor:
        return self.s.to(V.dtype)[:, None] * super().of(V)
