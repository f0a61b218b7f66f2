"""Updates that are two thin factors made of other tensors, run as a chain of them.

A method gives ``pair() -> (A, B)``, differentiable in its own tensors, with ``Delta = B A``; no
autograd function is written by hand. Tokens meet A and B alone. Backward keeps the input and
``x A^T``, makes the factors again and hands their gradients on to what they are made of.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import over_tokens
from ..matmul import linear, mm
from .dropped import Dropping


class Paired(Dropping):
    """``Delta = B A``, A (r, in) and B (out, r). Subclasses give :meth:`pair`, with a small r.

    Per token x is kept and r numbers, where anything trains. What is dropped is dropped around it
    (dropped.py).
    """

    tokenwise: ClassVar[bool] = True
    cheap_tile: ClassVar[bool] = True

    def pair(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dense(self) -> Tensor:
        A, B = self.pair()
        return B @ A

    def panel(self, i0: int, i1: int) -> Tensor:
        A, B = self.pair()
        return B @ A[:, i0:i1]

    def product(self, x: Tensor) -> Tensor:
        A, B = self.pair()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        with torch.no_grad():
            return self.panel(i0, i1)

    def upon(self, base: Tensor, i0: int, i1: int, state: Any, scale: float) -> Tensor:
        with torch.no_grad():
            A, B = self.pair()
            if type(self).tile is not Paired.tile or A.dtype != base.dtype:
                return super().upon(base, i0, i1, state, scale)
            return torch.addmm(base, B, A[:, i0:i1], alpha=scale)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        with torch.no_grad():
            A, B = self.pair()
        h_NR = linear(x_NI, A.to(x_NI.dtype))
        y_NO.addmm_(h_NR.to(y_NO.dtype), B.t().to(y_NO.dtype), alpha=scale)
        return (h_NR if any(t.requires_grad for t in self.theta()) else None,)

    def by_strips(self, kept: tuple[Any, ...]) -> bool:
        return type(self).backward_ is Paired.backward_ or super().by_strips(kept)

    def backward_(self, g_NO: Tensor, x_NI: Any, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        (h_NR,), theta = kept, self.theta()
        with torch.enable_grad():
            A, B = self.pair()
        gB_NR = mm(g_NO, B.detach().to(g_NO.dtype))
        if scale != 1:
            gB_NR.mul_(scale)
        if dx_NI is not None:
            dx_NI.addmm_(gB_NR, A.detach().to(g_NO.dtype))
        made, pulled = [], []
        if A.requires_grad:
            made.append(A)
            pulled.append(over_tokens(x_NI, gB_NR).t().to(A.dtype))
        if B.requires_grad:
            dB = over_tokens(g_NO, h_NR)
            made.append(B)
            pulled.append((dB if scale == 1 else dB.mul_(scale)).to(B.dtype))
        wanted = [t for t in theta if t.requires_grad]
        got = iter(torch.autograd.grad(made, wanted, pulled, allow_unused=True) if made else ())
        return [next(got, None) if t.requires_grad else None for t in theta]

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[Any, ...], scale: float
              ) -> Tensor | None:
        (h_NR,), (A, B) = kept, self.pair()
        if h_NR is None:
            h_NR = linear(x_NI, A.to(x_NI.dtype))
        return (over_tokens(g_NO, h_NR) * B).sum(-1).mul_(scale)
