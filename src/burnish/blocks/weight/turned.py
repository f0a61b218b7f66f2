"""Linears whose weight and input are rounded in turned coordinates, and keys and values that are.

    y = q_x(x R) q_w(W R)^T + b         R orthogonal (walsh.py), or none

Without rounding that is ``x W^T + b`` whatever R. A turn spreads an outlier over all coordinates,
so that a grid that spans the range of a row has finer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..choose.observe import Statistic, tokens, wide
from ..state.attending import Attending, named
from .quantise import Quantiser
from .straight import Straight, token_codes, token_passed, token_values
from .walsh import Walsh


class Turned(Straight):
    """Tokens on grids of their own (2^bits numbers), weights on one around zero per output.

    walsh: the turn, or None. span: the share of a token's range that its grid spans.
    """

    def __init__(self, inp: int, bits: int, input_bits: int, span: float, walsh: Walsh | None):
        super().__init__()
        self.inp, self.input_bits, self.span = inp, input_bits, span
        self.grid_w = Quantiser(bits, 0, symmetric=True)
        self.walsh = walsh

    def code(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        return token_codes(self.ready(x_NI), self.input_bits, self.span)

    def opened(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return token_values(kept, self.input_bits, self.inp, dtype)

    def passed(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self.restored(token_passed(g_NI, kept))

    def ready(self, V: Tensor) -> Tensor:
        return V if self.walsh is None else self.walsh.turn(V)

    def rounded(self, made: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:
        return values(made, self.grid_w), None

    def restored(self, V: Tensor) -> Tensor:
        return V if self.walsh is None else self.walsh.back(V)


@torch.no_grad()
def values(V: Tensor, grid: Quantiser) -> Tensor:
    """A weight on its grid, in its own precision."""
    return grid.decode(*grid.encode(V), V.dtype)


class TurnErrors(Statistic):
    """How much rounding changes inputs and weight of a place, as they are and turned: squared, as a
    share of their own squares."""

    def __init__(self, term: Turned):
        self.term = term                             # with its turn
        self.off: Tensor = torch.zeros(2)
        self.size: Tensor = torch.zeros(())
        self.weight: Tensor = torch.zeros(2)

    @property
    def key(self) -> Hashable:
        return id(self)                              # of a weight of its own

    @property
    def nbytes(self) -> int:
        return 32

    @torch.no_grad()
    def weigh(self, W: Tensor) -> None:
        W, t = wide(W), self.term.to(W.device)
        self.weight = torch.stack([(values(V, t.grid_w) - V).square().sum()
                                   for V in (W, t.ready(W))]) / W.square().sum()

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        rows, t = wide(tokens(x, valid)), self.term.to(x.device)
        off = torch.stack([
            (token_values(token_codes(r, t.input_bits, t.span), t.input_bits, t.inp, r.dtype)
             - r).square().sum() for r in (rows, t.ready(rows))])
        self.off, self.size = self.off.to(off) + off, self.size.to(off) + rows.square().sum()

    @property
    def errors(self) -> Tensor:
        """(as they are, turned)."""
        return self.off / self.size.clamp_min(torch.finfo(self.off.dtype).tiny) \
            + self.weight.to(self.off)


class RoundedRows(torch.autograd.Function):
    """Rows (..., n) on grids of their own; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return token_values(token_codes(rows, bits), bits, x.shape[-1], x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class RoundedKeys(Attending):
    """An attention that finds its keys and values on grids, one for each token and head.

    Queries and keys are turned before (behind rotary positions), which leaves their products, and
    values are turned and turned back.
    """

    part = "roste"

    def __init__(self, state: Any, adapter: str, bits: int, walsh: Walsh | None):
        super().__init__(state, adapter)
        self.bits, self.walsh = bits, walsh

    def attend(self, module: Any, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        given = named(args, kwargs)
        q, k, v = (given.pop(n) for n in ("query", "key", "value"))
        turn = (lambda t: t) if self.walsh is None else self.walsh.turn
        back = (lambda t: t) if self.walsh is None else self.walsh.back
        k = RoundedRows.apply(turn(k), self.bits)
        v = back(RoundedRows.apply(turn(v), self.bits))
        return func(turn(q), k, v, **given)
