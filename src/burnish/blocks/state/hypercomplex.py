"""Adapters whose matrices are sums of Kronecker products of a few numbers that all share, and of
thin matrices of their own.

Letters: N tokens, D width, M width of the bottleneck, n blocks, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..tape.executor import checkpoint
from .bottleneck import activation


class Slow(nn.Module):
    """A (n, n, n), N(0, 0.01): the first factors of every :class:`Hypercomplex`."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.A = n, nn.Parameter(torch.randn(n, n, n) * 0.01)


class Hypercomplex(nn.Module):
    """``y = x H + bias``, ``H = sum_i A_i (x) (s_i t_i^T)`` (d_in, d_out): s (n, d_in / n, R), t
    (n, d_out / n, R) Xavier-uniform with gain sqrt 2, bias 0; A is given. H is never formed: x is
    read as n rows, ``Y = sum_i A_i^T (X s_i) t_i^T``."""

    def __init__(self, d_in: int, d_out: int, n: int, rank: int):
        super().__init__()
        self.n = n
        self.s, self.t = (nn.Parameter(torch.stack([nn.init.xavier_uniform_(
            torch.empty(d // n, rank), math.sqrt(2)) for _ in range(n)])) for d in (d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        A, s, t = (p.to(x.dtype) for p in (A, self.s, self.t))
        X = x.unflatten(-1, (self.n, -1))
        Z = torch.einsum("...ac,icr->...iar", X, s)
        Y = torch.einsum("...ibr,idr->...bd", torch.einsum("...iar,iab->...ibr", Z, A), t)
        return Y.flatten(-2) + self.bias.to(x.dtype)


class HypercomplexAdapter(nn.Module):
    """``f(h) = up(act(down(h)))``, both :class:`Hypercomplex` with the same A.

    slow: what holds A; who holds it for others `owns` it, the others borrow. zero: t of `up` is
    zero at the start, so f is. Kept for backward: h alone; backward runs the adapter again.
    """

    slow: Slow

    def __init__(self, d: int, width: int, slow: Slow, rank: int, act: str, owns: bool,
                 zero: bool):
        super().__init__()
        self.act = act
        self.down = Hypercomplex(d, width, slow.n, rank)
        self.up = Hypercomplex(width, d, slow.n, rank)
        if zero:
            nn.init.zeros_(self.up.t)
        if owns:
            self.add_module("slow", slow)
        else:
            self.__dict__["slow"] = slow

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another holds, for whoever runs this again in backward."""
        return () if "slow" in self._modules else (self.slow.A,)

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (h,), {})

    def run(self, h: Tensor) -> Tensor:
        """The adapter itself."""
        A = self.slow.A
        return self.up(activation(self.act)(self.down(h, A)), A)

    @staticmethod
    def count(d: int, width: int, rank: int) -> int:
        """Trainable numbers of one adapter, A left out."""
        return 2 * rank * (d + width) + width + d
