"""Factor chains: an update that is a short product of factors, evaluated on the token side.

``Delta = scale * B A`` with A (R, I) and B (O, R); experts carry a leading axis. The product
x A^T is R wide, so the chain costs R (I + O) per token and keeps x for A's gradient and R
numbers for B's; with A frozen it keeps R numbers per token and no x at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from ..linalg import over_tokens
from ..matmul import linear, mm
from ..tape.replay import Mask
from .persample import product_norms
from .provided import Term
from .term import Run


class Chain(Term):
    """``Delta = scale * B A``; A is Kaiming-uniform(sqrt 5), B zero: identity at the start.

    A: (rank, in), B: (out, rank); for experts (E, rank, in) and (E, out, rank).
    dropout acts on the input of A and is drawn again in backward, never kept; where there is no
    input (a weight read past its module, rows of a table) it cannot act: see `effective`.
    train_a=False is LoRA-FA: only R numbers per token are kept.
    """

    tokenwise: ClassVar[bool] = True
    cheap_tile: ClassVar[bool] = True

    def __init__(self, place: Place, rank: int, scale: float = 1.0, dropout: float = 0.0,
                 train_a: bool = True, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None):
        super().__init__()
        lead = (place.experts,) if place.experts else ()
        self.A = nn.Parameter(torch.empty(*lead, rank, place.inp, dtype=dtype, device=device),
                              requires_grad=train_a)
        self.B = nn.Parameter(torch.zeros(*lead, place.out, rank, dtype=dtype, device=device))
        self.scale, self.dropout = scale, dropout
        if place.kind == "embedding":          # rows of A are looked up: A zero, B normal
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            nn.init.uniform_(self.A, -1 / math.sqrt(place.inp), 1 / math.sqrt(place.inp))

    def begin(self, A: Tensor, B: Tensor | None) -> None:
        """Take other starting values; None leaves B as it is."""
        for there, value in ((self.A, A), (self.B, B)):
            if value is not None:
                there.data.copy_(value)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank), whose product is the update."""
        return self.A, self.B * self.scale

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.factors()

    @property
    def keeps_input(self) -> bool:
        return self.A.requires_grad

    def dense(self) -> Tensor:
        return self.scale * (self.B @ self.A)

    def reads(self, need_x: bool) -> tuple[Tensor, ...]:
        """B on the way to x and to A, A on the way to x."""
        rest = tuple(self.buffers())
        if need_x:
            return (self.A, self.B, *rest)
        return (self.B, *rest) if self.A.requires_grad else rest

    def plain(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout) or type(self).dense is not Chain.dense:
            return super().plain(x)
        x = F.dropout(x, self.dropout, True)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        mask = None
        if self.dropout and self.training:
            mask = Mask(x_NI, self.dropout)
            x_NI = mask.first(x_NI)
        h_NR = linear(x_NI, self.A.to(x_NI.dtype))
        y_NO.addmm_(h_NR.to(y_NO.dtype), self.B.t().to(y_NO.dtype), alpha=self.scale * scale)
        return (h_NR if self.B.requires_grad else None, mask)

    def by_strips(self, kept: tuple[object, ...]) -> bool:
        if type(self).backward_ is not Chain.backward_:
            return super().by_strips(kept)
        return kept[1] is None or not self.keeps_input

    def backward_(self, g_NO: Tensor, x_NI: Any, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        h_NR, mask = kept
        s = self.scale * scale
        A, B = self.A.to(g_NO.dtype), self.B.to(g_NO.dtype)
        dB = None if h_NR is None else over_tokens(g_NO, h_NR).mul_(s).to(self.B.dtype)
        gB_NR = mm(g_NO, B).mul_(s)
        dA = None
        if self.A.requires_grad:
            x = x_NI if mask is None else mask(x_NI)
            dA = over_tokens(x, gB_NR).t().to(self.A.dtype)
        if dx_NI is not None:
            if mask is None:
                dx_NI.addmm_(gB_NR, A)
            else:                               # dropout is linear: the same mask on the gradient
                dx_NI.add_(mask(gB_NR @ A))
        return [dA, dB]

    @property
    def by_expert(self) -> bool:
        cls = type(self)
        return self.A.dim() == 3 and set(self._parameters) == {"A", "B"} \
            and cls.forward_ is Chain.forward_ and cls.backward_ is Chain.backward_

    def forward_each(self, x_SI: Tensor, y_SO: Tensor, runs: Sequence[Run], scale: float
                     ) -> tuple[Tensor | None, ...]:
        h_SR = x_SI.new_empty(len(x_SI), self.A.shape[1])
        for e, a, b in runs:
            torch.mm(x_SI[a:b], self.A[e].t().to(x_SI.dtype), out=h_SR[a:b])
            y_SO[a:b].addmm_(h_SR[a:b], self.B[e].t().to(y_SO.dtype), alpha=self.scale * scale)
        return (h_SR if self.B.requires_grad else None,)

    def backward_each(self, g_SO: Tensor, x_SI: Any, kept: tuple[Tensor | None, ...],
                      dx_SI: Tensor | None, runs: Sequence[Run], scale: float
                      ) -> list[Tensor | None]:
        (h_SR,) = kept
        s = self.scale * scale
        dA, dB = (torch.zeros_like(t) if t.requires_grad else None for t in (self.A, self.B))
        gB_SR = g_SO.new_empty(len(g_SO), self.A.shape[1])
        for e, a, b in runs:
            g, gB = g_SO[a:b], gB_SR[a:b]
            torch.mm(g, self.B[e].to(g.dtype), out=gB).mul_(s)
            if h_SR is not None and dB is not None:
                dB[e] = over_tokens(g, h_SR[a:b]).mul_(s)
            if dA is not None:
                dA[e] = over_tokens(x_SI[a:b], gB).t()
            if dx_SI is not None:
                dx_SI[a:b].addmm_(gB, self.A[e].to(g.dtype))
        return [dA, dB]

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[object, ...], scale: float
              ) -> Tensor | None:
        h_NR, mask = kept
        if h_NR is None or mask is None and type(self).forward_ is not Chain.forward_:
            return None
        return (over_tokens(g_NO, h_NR) * self.B).sum(-1).mul_(self.scale * scale)

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        return (self.B @ self.A[..., i0:i1]).mul_(self.scale)

    def upon(self, base: Tensor, i0: int, i1: int, state: object, scale: float) -> Tensor:
        if type(self).tile is not Chain.tile or self.A.dim() == 3 or self.A.dtype != base.dtype:
            return super().upon(base, i0, i1, state, scale)
        return torch.addmm(base, self.B, self.A[:, i0:i1], alpha=self.scale * scale)

    def pull(self, i0: int, i1: int, G: Tensor, state: object,
             grads: list[Tensor | None]) -> Tensor:
        G = G.to(self.A.dtype)
        if self.B.requires_grad:
            part = (G @ self.A[..., i0:i1].transpose(-1, -2)).mul_(self.scale)
            grads[1] = part if grads[1] is None else grads[1].add_(part)
        if self.A.requires_grad:
            if grads[0] is None:
                grads[0] = torch.zeros_like(self.A)
            grads[0][..., i0:i1] += (self.B.transpose(-1, -2) @ G).mul_(self.scale)
        return self.tile(i0, i1, state)

    def sample_norms(self, x_BTI: Tensor, g_BTO: Tensor) -> list[Tensor | None]:
        if self.dropout and self.training:
            return super().sample_norms(x_BTI, g_BTO)
        s = self.scale**2
        x, g = x_BTI.to(self.A.dtype), g_BTO.to(self.A.dtype)
        dA = product_norms(g @ self.B, x) * s if self.A.requires_grad else None
        dB = product_norms(g, x @ self.A.t()) * s if self.B.requires_grad else None
        return [dA, dB]

    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        h = F.embedding(index, self.A.transpose(-1, -2), padding)
        return (h @ self.B.transpose(-1, -2)) * self.scale
