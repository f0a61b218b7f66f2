"""Rows of a table that is changed: what an embedding looks up, its update beside it.

Letters: D width, V vocabulary; the table is the transpose of a (D, V) matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backward import again
from .provided import Panels, Weighted, plainly


def looked_up(index: Tensor, op: Weighted, table: Callable[[Tensor], Tensor],
              padding: int | None, held: Sequence[Tensor]) -> Tensor:
    """Rows `index` of the table with everything added: (*index.shape, D).

    table: looks up the stored table.  held: what it reads.  padding: as in
    ``nn.Embedding(padding_idx=...)``: nothing gets a gradient from that row.

    Under a diagonal function of W, ``y = f * (rows + s rows of the update)`` with the lengths of
    all D rows of V read off panels of the table once; backward looks the rows up again, so that it
    keeps the index, D lengths and nothing per token.
    """
    if op.wrap is None:
        return _rows(index, op, table, padding)
    wrap = op.wrap
    made = op.made(index)                            # evaluation reads the lengths once

    @torch.no_grad()
    def lengths() -> Any:
        states = [t.prepare() for t, _ in op.terms]
        return wrap.gains(Panels(op.base(), op.terms, states))[1]

    kept = made.small("lengths", lengths)

    def product(index: Tensor) -> Tensor:
        rows = _rows(index, op, table, padding, wide=True)
        return _still((rows * wrap.gained(kept)).to(dtype), index, padding)

    dtype = table(index.reshape(-1)[:0]).dtype
    theta = (*op.theta(), *held)
    return product(index) if plainly(op.theta()) else again(product, index, theta)


def _rows(index: Tensor, op: Weighted, table: Callable[[Tensor], Tensor], padding: int | None,
          wide: bool = False) -> Tensor:
    out = table(index)
    if wide:
        out = out.to(torch.promote_types(out.dtype, torch.float32))
    for term, scale in op.terms:
        out = out + scale * term.take(index, padding).to(out.dtype)
    return _still(out, index, padding)


def _still(y: Tensor, index: Tensor, padding: int | None) -> Tensor:
    """No gradient from the row of padding, whatever it was made of."""
    return y if padding is None else torch.where((index == padding).unsqueeze(-1), y.detach(), y)
