"""Away from the start, where zeros hide nothing."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..engine.swap import ATTR

T = TypeVar("T")


@torch.no_grad()
def stir(owner: T, seed: int = 1, size: float = 0.05, *, adapter: str | None = None) -> T:
    """Add size * N(0, 1) to every tensor that trains, of a tuned model or of a module; or to all
    that an adapter owns, whether it trains just now or not. The same on every machine; returns
    what it was given."""
    g = torch.Generator().manual_seed(seed)
    named: Any = owner.named_parameters() if adapter is None else owner.model.named_parameters()
    for name, p in named:
        if p.requires_grad if adapter is None else f".{ATTR}.{adapter}." in f".{name}":
            drawn = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.add_((drawn * size).to(p))
    return owner
