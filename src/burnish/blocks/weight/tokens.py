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
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.int64), persistent=False)
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

    def dense(self) -> Tensor:
        empty = self.rows.new_zeros(self.rows.shape[1], self.inp)
        return empty.index_copy(1, self.ids, self.rows.t())

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        panel = self.rows.new_zeros(self.rows.shape[1], i1 - i0)
        inside = ((self.ids >= i0) & (self.ids < i1)).nonzero().squeeze(1)
        return panel.index_copy(1, self.ids[inside] - i0, self.rows.detach()[inside].t())
