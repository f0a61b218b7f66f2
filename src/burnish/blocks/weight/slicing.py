"""Structural pruning: a smaller block cut out of a large one along rows and columns.

Index sets say which channels stay. They are chosen by importance (here |W|), and each matrix takes
its columns from the set its input kept and its rows from a set of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def largest(score: Tensor, n: int) -> Tensor:
    """Positions of the n largest, in ascending order."""
    return score.float().topk(n).indices.sort().values


def largest_per_head(score: Tensor, heads: int, n: int) -> Tensor:
    """The same inside each head: score (heads * h,) -> n positions per head."""
    per = score.view(heads, -1)
    inside = per.float().topk(n, dim=1).indices.sort(1).values
    return (inside + torch.arange(heads, device=score.device).unsqueeze(1) * per.shape[1]).flatten()


def every(width: int, step: int, heads: int) -> Tensor:
    """Rotary positions of a head cut by `step`: every step-th frequency, both of its halves."""
    half = torch.arange(0, width // 2, step)
    inside = torch.cat([half, half + width // 2])
    return (inside + torch.arange(heads).unsqueeze(1) * width).flatten()


def row_importance(*weights: Tensor) -> Tensor:
    """Row-L1 of the product of |W| of matrices that must keep the same rows."""
    product = weights[0].detach().abs().float()
    for w in weights[1:]:
        product = product * w.detach().abs()
    return product.sum(1)


@torch.no_grad()
def cut(target: Tensor, source: Tensor, rows: Tensor, columns: Tensor | None = None) -> None:
    """``target <- source[rows, columns]``, in place; target has the sizes of the index sets."""
    part = source.detach().index_select(0, rows.to(source.device))
    if columns is not None:
        part = part.index_select(1, columns.to(source.device))
    target.copy_(part)


def cut_norm(norm: nn.Module, keep: Tensor) -> nn.Module:
    """A norm of its own class on the kept channels, with their scales and shifts."""
    made = copy.copy(norm)
    made.__class__ = getattr(type(norm), "_burnish_base", type(norm))
    nn.Module.__init__(made)                    # no hooks, no slot: only its own settings stay
    for k, p in norm._parameters.items():
        part = None if p is None else p.detach().index_select(0, keep.to(p.device))
        made.register_parameter(k, None if part is None else nn.Parameter(part))
    for name in ("normalized_shape", "hidden_size", "dim"):
        value = getattr(made, name, None)
        if isinstance(value, tuple):
            setattr(made, name, (len(keep),))
        elif isinstance(value, int):
            setattr(made, name, len(keep))
    return made
