"""A tensor that grows or shrinks while it trains, with everything that follows its shape."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import RecipeError

#: what becomes of the optimizer's state of a tensor whose entries are chosen again
Moments = Literal["keep", "drop"]


def resized(t: Tensor, dim: int, keep: Tensor | None, fresh: Tensor | None) -> Tensor:
    """The slices `keep` of t along `dim`, in that order (None: all), then `fresh` ones."""
    if keep is not None:
        t = t.index_select(dim, keep.to(t.device))
    return t if fresh is None else torch.cat([t, fresh.to(t)], dim)


@torch.no_grad()
def resize(p: nn.Parameter, dim: int, keep: Tensor | None = None, fresh: Tensor | None = None,
           optimizer: torch.optim.Optimizer | None = None, name: str = "a tensor",
           moments: Moments = "keep") -> None:
    """Change `p` as :func:`resized` does, in place: it stays the same parameter in the same group.

    Its gradient goes with it, and its moments; fresh slices start with none (zeros). moments:
    "drop": the optimizer knows it no more, counts begin again. Raises RecipeError, with nothing
    changed, where the state is held in a form that has lost the shape.
    """
    old = p.shape
    if moments == "drop" and optimizer is not None:
        optimizer.state.pop(p, None)
    state = {} if optimizer is None else optimizer.state.get(p, {})
    zeros = None if fresh is None else torch.zeros_like(fresh)

    def follow(t: Tensor) -> Tensor:
        return resized(t.view(old), dim, keep, zeros)

    check(p, optimizer, name)
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.dim():
            continue                                 # counts
        flat = value.dim() == 1 and len(old) > 1
        moved[key] = follow(value).reshape(-1) if flat else follow(value)
    grad = None if p.grad is None else follow(p.grad)
    made = resized(p.detach(), dim, keep, fresh).contiguous()
    # a graph that is still alive (a loss somebody holds) keeps the parameter's place in graphs, and
    # that place its old shape; another dtype in between makes it a new one
    p.data = made.new_empty((), dtype=torch.float32 if made.dtype != torch.float32
                            else torch.float64)
    p.data = made
    p.grad = grad
    state.update(moved)
    shapes: dict[nn.Parameter, torch.Size] = getattr(optimizer, "burnish_shapes", {})
    if p in shapes:
        shapes[p] = p.shape


def check(p: nn.Parameter, optimizer: torch.optim.Optimizer | None, name: str) -> None:
    """Raises RecipeError where the optimizer's state of `p` could not follow it."""
    for key, value in ({} if optimizer is None else optimizer.state.get(p, {})).items():
        if isinstance(value, Tensor) and value.dim() and value.numel() != p.numel():
            raise RecipeError(f"{name} cannot change its shape: its optimizer state {key!r} is "
                              "held in a coded or projected form; use adamw for a recipe whose "
                              "ranks change")
