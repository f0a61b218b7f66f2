"""Rows of an embedding that are changed one by one: the entries of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from .term import Term


class Tokens(Term):
    """``E'[id_k] = E[id_k] + rows_k``; rows (n, width), n tokens of a table of `inp`.

    A lookup costs a search among n ids per token and adds one row where it finds one.
    """

    tiled = True

    def __init__(self, place: Place, ids: Sequence[int]):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(len(ids), place.out))
        self.rows.burnish_decay = False
        self.inp = place.inp
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        ordered = self.ids.sort()
        self.register_buffer("sorted", ordered.values, persistent=False)
        self.register_buffer("order", ordered.indices, persistent=False)

    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        at = torch.searchsorted(self.sorted, index).clamp_(max=len(self.sorted) - 1)
        hit = self.sorted[at] == index
        if padding is not None:
            rows = F.embedding(self.order[at], self.rows)
            rows = torch.where((index == padding).unsqueeze(-1), rows.detach(), rows)
        else:
            rows = F.embedding(self.order[at], self.rows)
        return rows * hit.unsqueeze(-1).to(rows.dtype)

    def mirrored(self, end: Place) -> Term:
        return Read(self) if end.kind == "linear" else Looked(self)

    def dense(self) -> Tensor:
        empty = self.rows.new_zeros(self.rows.shape[1], self.inp)
        return empty.index_copy(1, self.ids, self.rows.t())

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        panel = self.rows.new_zeros(self.rows.shape[1], i1 - i0)
        inside = ((self.ids >= i0) & (self.ids < i1)).nonzero().squeeze(1)
        return panel.index_copy(1, self.ids[inside] - i0, self.rows.detach()[inside].t())


class _Mirror(Term):
    """The rows of a :class:`Tokens` at another module that reads the same table."""

    mirrors = True

    def __init__(self, of: Tokens):
        super().__init__()
        self.__dict__["of"] = of                 # its own module holds it

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return (self.of.rows,)

    def reads(self, need_x: bool) -> tuple[Tensor, ...]:
        return self.of.reads(need_x)


class Looked(_Mirror):
    """Another table: what the first one looks up."""

    tiled = True

    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        return self.of.take(index, padding)

    def dense(self) -> Tensor:
        return self.of.dense()

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        return self.of.tile(i0, i1, state)


class Read(_Mirror):
    """A linear over the vocabulary: ``y[id_k] += x . rows_k``."""

    tokenwise, cheap_tile = True, True

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[()]:
        made = x_NI.to(y_NO.dtype) @ self.of.rows.to(y_NO).t()
        y_NO.index_add_(1, self.of.ids.to(y_NO.device), made, alpha=scale)
        return ()

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[()], dx_NI: Tensor | None,
                  scale: float) -> list[Tensor | None]:
        rows = self.of.rows
        g = g_NO[:, self.of.ids.to(g_NO.device)]
        if dx_NI is not None:
            dx_NI.addmm_(g.to(dx_NI.dtype), rows.to(dx_NI), alpha=scale)
        if not rows.requires_grad:
            return [None]
        assert x_NI is not None
        return [(g.t() @ x_NI).to(rows).mul_(scale)]

    def dense(self) -> Tensor:
        return self.of.dense().t()

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        rows = self.of.rows.detach()[:, i0:i1]
        return rows.new_zeros(self.of.inp, i1 - i0).index_copy_(0, self.of.ids, rows)

    def panel(self, i0: int, i1: int) -> Tensor:
        rows = self.of.rows[:, i0:i1]
        return rows.new_zeros(self.of.inp, i1 - i0).index_copy(0, self.of.ids, rows)
