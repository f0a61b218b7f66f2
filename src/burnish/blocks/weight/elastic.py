"""Numbers of one bit whose scale trains, and linears of them.

    signed:    a sign(x)                          dx where |x| <= a,        da = c sum dy sign(x)
    unsigned:  a clamp(round(x / a), 0, 1)        dx where 0 <= x <= a,     da = c sum dy r

r is 1 above a, 0 below zero and ``round(x / a) - x / a`` between; ``c = 1 / sqrt(numel)``, so that
a scale moves no faster than what it scales (learned step sizes, with the largest code 1). sign(0)
is 1; a scale counts as :data:`LEAST` at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .provided import Weighted
from .signed import of_rows, row_bits, signs
from .straight import Straight

#: the smallest scale
LEAST = 1e-5
#: a scale of signs at the start, over the mean of |x|
SIGNED = 2.0


def signed(x: Tensor, scale: Tensor) -> Tensor:
    """``a sign(x)``, a one number."""
    a = scale.detach().clamp_min(LEAST).to(x.dtype)
    sign = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return sign * a + _through(x, x.detach().abs() <= a) + _pull(sign, scale)


def unsigned(x: Tensor, scale: Tensor) -> Tensor:
    """``a clamp(round(x / a), 0, 1)``, a one number."""
    a = scale.detach().clamp_min(LEAST).to(x.dtype)
    share = x.detach() / a
    code = share.round().clamp(0, 1)
    inside = (share >= 0) & (share <= 1)
    return code * a + _through(x, inside) + _pull(torch.where(inside, code - share, code), scale)


def _through(x: Tensor, inside: Tensor) -> Tensor:
    """Zeros that pass a gradient to x."""
    some = x.masked_fill(~inside, 0)
    return some - some.detach()


def _pull(slope: Tensor, scale: Tensor) -> Tensor:
    """Zeros that pass a gradient to the scale."""
    own = scale * slope.numel() ** -0.5
    return slope * (own - own.detach()).to(slope.dtype)


class Centred(Straight):
    """``q_w(V)_o = m_o sign(V_o - mean(V))``, m_o the mean of ``|V_o|``, the other mean one of all
    entries; both are taken as they are and the gradient passes everywhere.

    rows: what shares m, the inputs of an output (1), or of a table the entries of a token (0, as
    tables are seen turned)."""

    def __init__(self, rows: int = 1):
        super().__init__()
        self.rows = rows

    def rounded(self, made: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:
        size = V.abs().mean(self.rows, keepdim=True)
        return torch.where(made >= V.mean(), size, -size), None


class Elastic(Centred):
    """A linear of these weights on inputs ``a sign(x)``, and beside it, from x itself, ``B A x``.

    a: one number, which trains without weight decay. A (rank, in) N(0, 0.02), B (out, rank) the
    same, or zero; rank 0: none. Backward keeps two bits of each input (and x where there is a
    rank)."""

    def __init__(self, out: int, inp: int, start: float = 1.0, rank: int = 0, zero: bool = False):
        super().__init__()
        self.inp = inp
        self.a = nn.Parameter(torch.tensor(float(start)))
        self.a.burnish_decay = False                 # type: ignore[attr-defined]
        self.A = nn.Parameter(torch.randn(rank, inp) * 0.02) if rank else None
        self.B = nn.Parameter(torch.randn(out, rank) * (0.0 if zero else 0.02)) if rank else None

    def code(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        a = self.a.detach().clamp_min(LEAST).to(x_NI.dtype)
        return row_bits(x_NI >= 0), row_bits(x_NI.abs() <= a)

    def opened(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        a = self.a.detach().clamp_min(LEAST).to(dtype)
        return signs(kept[0], self.inp, dtype).mul_(a)

    def passed(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return g_NI.masked_fill(~of_rows(kept[1], self.inp), 0)

    def pulled(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        g = g_NI.to(torch.promote_types(g_NI.dtype, self.a.dtype))
        da = (g * signs(kept[0], self.inp, g.dtype)).sum() * g.numel() ** -0.5
        return (da.to(self.a.dtype), *(None for _ in self.theta()[1:]))

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        y = super().linear(x, op, bias, weight)
        if self.A is None or self.B is None:
            return y
        return y + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
