"""V = base + tiles, panel by panel over the inputs, and its products.

A panel is (O, n): all outputs, a run of inputs. Letters: N tokens, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..gpu.coded import Coded
from ..matmul import linear, mm
from .term import Term

#: entries of one panel; a matrix up to this size is a single panel (16 MiB in fp32)
PANEL = 1 << 22
#: first column, end, and the panel between them
Piece = tuple[int, int, Tensor]


class Panels:
    """V = base + tiles, panel by panel over the inputs; the only place that knows the loop."""

    def __init__(self, weight: Tensor | Coded, terms: list[tuple[Term, float]], states: list[Any]):
        self.weight, self.terms, self.states = weight, terms, states
        self.out, self.inp = weight.shape[-2:]

    def ranges(self) -> list[tuple[int, int]]:
        """The runs of inputs, one after the other."""
        whole = any(not t.tiled and not t.cheap_tile for t, _ in self.terms)
        step = self.inp if whole else max(1, min(self.inp, PANEL // max(1, self.out)))
        return [(i0, min(self.inp, i0 + step)) for i0 in range(0, self.inp, step)]

    def columns(self, i0: int, i1: int) -> Tensor:
        """Those of the base: a view, or decoded."""
        part = self.weight[..., i0:i1]
        return part.decode() if isinstance(part, Coded) else part

    def added(self, i0: int, i1: int) -> Tensor | None:
        """What the terms add to columns i0:i1: a fresh panel, in their own precision."""
        panel: Tensor | None = None
        for (term, scale), state in zip(self.terms, self.states, strict=True):
            tile = term.tile(i0, i1, state)
            tile = tile if scale == 1 else tile.mul_(scale)
            panel = tile if panel is None else panel.add_(tile)
        return panel

    def value(self, i0: int, i1: int) -> Tensor:
        """V[:, i0:i1]: a fresh panel, or the base's columns when nothing is added."""
        base = self.columns(i0, i1)
        if base.element_size() >= 4:
            for (term, scale), state in zip(self.terms, self.states, strict=True):
                base = term.upon(base, i0, i1, state, scale)
            return base
        panel = self.added(i0, i1)               # in half precision all of it is rounded once
        return base if panel is None else panel.add_(base.to(panel.dtype)).to(base.dtype)

    def pieces(self, half: bool) -> Iterator[Piece]:
        """V by panels; what is added alone, rounded as the tokens are, where `half`."""
        for i0, i1 in self.ranges():
            yield i0, i1, self.added(i0, i1).to(self.weight.dtype) if half else self.value(i0, i1)

    def row_squares(self) -> Tensor:
        """sum_i V[o, i]^2, accumulated in at least fp32."""
        acc = None
        for i0, i1 in self.ranges():
            v = self.value(i0, i1)
            v = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
            part = torch.linalg.vector_norm(v, dim=-1).square_()
            acc = part if acc is None else acc.add_(part)
        return acc


def _mm(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a b, with `wide` for half precision in fp32 as it is accumulated."""
    if not wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def product(x2: Tensor, pieces: Iterable[Piece], bias: Tensor | None) -> Tensor:
    """x V^T + b from the panels of V; one product when V is a single panel."""
    y: Tensor | None = None
    for i0, i1, panel in pieces:
        if i1 - i0 == x2.shape[1]:
            return linear(x2, panel, bias)
        if y is None:
            y = x2.new_empty(x2.shape[0], panel.shape[0])
            torch.mm(x2[:, i0:i1], panel.t(), out=y)
        else:
            y.addmm_(x2[:, i0:i1], panel.t())
    return y if bias is None else y.add_(bias)


def product_beside(x2: Tensor, weight: Tensor | Coded, pieces: Iterable[Piece], bias: Tensor | None,
                   wide: bool) -> Tensor:
    """The same with base and update as products of their own.

    In half precision: added to the weight first, what is below half its spacing would be lost.
    wide: in fp32, as it is accumulated.
    """
    if not wide:
        y = linear(x2, weight, bias)
    else:
        y = weight.linear(x2, wide=True) if isinstance(weight, Coded) else \
            _mm(x2, weight.t(), True)
    for i0, i1, added in pieces:
        if wide:
            y.add_(_mm(x2[:, i0:i1], added.t(), True))
        else:
            y.addmm_(x2[:, i0:i1], added.t())
    return y


def product_back(g2: Tensor, x2: Tensor | None, V: Panels, grads: list[list[Tensor | None]],
                 need_x: bool, keeps: list[bool]) -> Tensor | None:
    """dx = g V, and the pull of every tiled term from its panel of g^T x."""
    if not V.terms:
        return mm(g2, V.weight) if need_x else None
    half = g2.element_size() < 4                 # as in product_beside: two products
    dx = None
    if need_x:
        dx = mm(g2, V.weight) if half else None
    keeps = [pulls and not t.pull_straight(g2, x2, s, own)
             for (t, s), pulls, own in zip(V.terms, keeps, grads, strict=True)]
    if not need_x and not any(keeps):
        return None
    for i0, i1 in V.ranges():
        total: Tensor | None = None
        G = None
        if any(keeps):
            G = (x2[:, i0:i1].t() @ g2).t()
        for (t, s), state, pulls, own in zip(V.terms, V.states, keeps, grads, strict=True):
            if pulls:
                tile = t.pull(i0, i1, G if s == 1 else G * s, state, own)
            else:
                tile = t.tile(i0, i1, state)
            if need_x:
                total = tile * s if total is None else total.add_(tile, alpha=s)
        if not need_x:
            continue
        if half:
            dx[:, i0:i1].addmm_(g2, total.to(g2.dtype))
            continue
        panel = V.columns(i0, i1)
        total = total.add_(panel) if total.dtype == panel.dtype else \
            (total + panel).to(panel.dtype)
        if i1 - i0 == V.inp:
            return mm(g2, total)
        if dx is None:
            dx = g2.new_empty(g2.shape[0], V.inp)
        dx[:, i0:i1].copy_(g2 @ total)
    return dx
