"""A weight as direction times length, row by row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tape.replay import dropout
from .dropped import drops
from .panels import Panels
from .provided import Weighted, linear, straight
from .term import Wrap


class Magnitude(Wrap):
    """``W' = diag(m / c) V`` with c_o = ||V_o||_2 held constant in the gradient.

    m: (out,), starts as the row norms of the base. c is read off the panels of V in one pass, so
    no (out, in) temporary outlives a panel. A row of zeros keeps gain 1.

    dropout: what differs from the base sees ``drop(x)``, ``y = W x + (W' - W) drop(x) + b``: two
    products, ``W (x - drop(x)) + W' drop(x)``, and drop(x) is kept, not x.
    """

    diagonal: ClassVar[bool] = True
    dropout = 0.0

    def __init__(self, weight: Tensor):
        super().__init__()
        self.m = nn.Parameter(_lengths(weight))

    @torch.no_grad()
    def restart(self, V: Tensor) -> None:
        self.m.copy_(_lengths(V))

    def of(self, V: Tensor) -> Tensor:
        c = torch.linalg.vector_norm(V.detach(), dim=-1)
        zero = c == 0
        f = torch.where(zero, 1.0, self.m.to(V.dtype) / torch.where(zero, 1.0, c))
        return f.unsqueeze(-1) * V

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor | None:
        if not drops(self):
            return None
        xd = dropout(x, self.dropout)
        base = Weighted(op.base, [], None, op.held, op.room, op.coded)
        return linear(x - xd, base, bias, weight) + straight(xd, xd, op, None, weight)

    def gains(self, V: Panels) -> tuple[Tensor, Any]:
        c = V.row_squares().clamp_(min=0).sqrt_().to(self.m.dtype)
        inv = torch.where(c == 0, 0.0, 1 / torch.where(c == 0, 1.0, c))
        return torch.where(c == 0, 1.0, self.m * inv), inv

    def gained(self, kept: Any) -> Tensor:
        return torch.where(kept == 0, 1.0, self.m * kept)

    def pull_gains(self, df: Tensor, kept: Any) -> list[Tensor | None]:
        return [df * kept if self.m.requires_grad else None]


class Normed(Magnitude):
    """The same with c in the gradient, ``dV_o = (m / c) (G_o - (G_o . V_o) V_o / c^2)``, G the
    gradient of W': of each row what lies across it. W' stands while the layer runs, and once more
    in backward.
    """

    diagonal: ClassVar[bool] = False
    linear = Wrap.linear

    def of(self, V: Tensor) -> Tensor:
        zero = (V.detach() == 0).all(-1, keepdim=True)
        c = torch.linalg.vector_norm(V.masked_fill(zero, 1.0), dim=-1, keepdim=True)
        return torch.where(zero, V, self.m.to(V.dtype).unsqueeze(-1) / c * V)


def _lengths(weight: Tensor) -> Tensor:
    wide = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    return torch.linalg.vector_norm(wide, dim=-1)
