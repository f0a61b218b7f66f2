"""One adapter per sample: a batch is split by adapter, run, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.errors import RecipeError


def check_rows(rows: tuple[str | None, ...], args: tuple, kw: dict) -> None:
    """The batch of a call has one sample per adapter named."""
    batch = next(v.shape[0] for v in pytree.tree_leaves((args, kw))
                 if isinstance(v, Tensor) and v.dim())
    if batch != len(rows):
        raise RecipeError(f"use([...]) names {len(rows)} adapters for a batch of {batch}; give "
                          "one per sample")


def split(rows: tuple[str | None, ...], run: Callable[..., Any], *given: Any) -> Any:
    """``run(adapter, *given)`` on the samples of each adapter; the results in the batch's order.

    Tensors whose first axis is a multiple of the batch (heads, windows) go with their samples.
    """
    batch, order, outs = len(rows), [], []
    for name in dict.fromkeys(rows):
        index = torch.tensor([i for i, r in enumerate(rows) if r == name])
        order.append(index)
        outs.append(run(name, *pytree.tree_map(lambda v, i=index: _pick(v, i, batch), given)))
    back = torch.cat(order).argsort()
    return pytree.tree_map(lambda *parts: _join(parts, back), *outs)


def _pick(v: Any, index: Tensor, batch: int) -> Any:
    if not isinstance(v, Tensor) or not v.dim() or v.shape[0] % batch or not v.shape[0]:
        return v
    per = v.shape[0] // batch
    if per > 1:
        return v.view(batch, per, *v.shape[1:])[index.to(v.device)].flatten(0, 1)
    return v[index.to(v.device)]


def _join(parts: tuple, back: Tensor) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    whole = torch.cat(parts)
    per, where = whole.shape[0] // len(back), back.to(whole.device)
    if per > 1:
        return whole.view(len(back), per, *whole.shape[1:])[where].flatten(0, 1)
    return whole[where]
