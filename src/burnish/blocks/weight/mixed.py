"""Factors that are mixtures of random tensors nobody stores: only the coefficients train."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..linalg import over_tokens
from ..tape.functions import once_differentiable
from .term import Term

#: numbers of the random tensors that are drawn at once
DRAWN = 1 << 21


class Mixtures(Term):
    """``Delta = s B A``, ``A = A_f + sum_j a_j A_j``, ``B = sum_j b_j B_j``, j = 1..k.

    A_j (r, in) and B_j (out, r) are U(-1, 1) / sqrt(k), A_f is U(-1, 1) / sqrt(in); all are drawn
    on the host in fp32 from (seed, the place's name), some at a time, and forgotten. A forward
    draws once and keeps A and B for its backward, which draws again, for ``da_j = <dA, A_j>``.
    """

    tokenwise: ClassVar[bool] = True

    def __init__(self, place: Place, rank: int, k: int, scale: float, seed: int):
        super().__init__()
        self.inp, self.scale, self.k = place.inp, scale, k
        self.shapes = {"a": (rank, place.inp), "b": (place.out, rank)}
        self.salt = f"{seed}/{place.name}"
        self.a, self.b = nn.Parameter(torch.zeros(k)), nn.Parameter(torch.zeros(k))
        self.a.burnish_decay = self.b.burnish_decay = False

    def _generator(self, which: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.salt}/{which}".encode()))

    def bases(self, which: str) -> Iterator[tuple[int, Tensor]]:
        """(first j, some A_j or B_j as rows (n, r in)): the same numbers whenever it is asked."""
        like, g = getattr(self, which), self._generator(which)
        width = self.shapes[which][0] * self.shapes[which][1]
        step = max(1, DRAWN // width)
        for j in range(0, self.k, step):
            rows = torch.empty(min(step, self.k - j), width, dtype=torch.float32, device="cpu")
            rows.uniform_(-self.k**-0.5, self.k**-0.5, generator=g)
            yield j, rows.to(like)

    def fixed(self) -> Tensor:
        """A_f."""
        g, bound = self._generator("fixed"), self.inp**-0.5
        drawn = torch.empty(self.shapes["a"], dtype=torch.float32, device="cpu")
        return drawn.uniform_(-bound, bound, generator=g).to(self.a)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, differentiable in the coefficients."""
        return (self.fixed() + _Sum.apply(self.a, self, "a").view(self.shapes["a"]),
                _Sum.apply(self.b, self, "b").view(self.shapes["b"]))

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A, B * self.scale

    def dense(self) -> Tensor:
        A, B = self.pair()
        return B @ A

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        with torch.no_grad():
            A, B = self.factors()
        h_NR = x_NI @ A.t().to(x_NI.dtype)
        y_NO.addmm_(h_NR.to(y_NO.dtype), B.t().to(y_NO.dtype), alpha=self.scale * scale)
        return (A, B, h_NR) if self.a.requires_grad or self.b.requires_grad else (A, B, None)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        A, B, h_NR = kept
        gB_NR = (g_NO @ B.to(g_NO.dtype)).mul_(self.scale * scale)
        if dx_NI is not None:
            dx_NI.addmm_(gB_NR, A.to(g_NO.dtype))
        da = db = None
        if self.a.requires_grad and x_NI is not None:
            da = self.against("a", over_tokens(gB_NR, x_NI))
        if self.b.requires_grad and h_NR is not None:
            db = self.against("b", over_tokens(g_NO, h_NR).mul_(self.scale * scale))
        return [da, db]

    def against(self, which: str, d: Tensor) -> Tensor:
        """``<d, A_j>`` for every j."""
        d = d.reshape(-1).to(getattr(self, which).dtype)
        return torch.cat([rows @ d for _, rows in self.bases(which)])


class _Sum(torch.autograd.Function):
    """Coefficients -> the mixture they make, flat; backward draws the random tensors again."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, term: Mixtures, which: str) -> Tensor:
        ctx.term, ctx.which = term, which
        total = c.new_zeros(term.shapes[which][0] * term.shapes[which][1])
        for j, rows in term.bases(which):
            total.addmv_(rows.t(), c[j : j + len(rows)])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.term.against(ctx.which, g), None, None
