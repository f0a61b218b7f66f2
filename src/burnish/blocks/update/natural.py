"""A projected gradient times the inverse of its own recent outer products.

    g = vec(R),  H = [the last s of them, g included]  (k, s)
    g <- (lambda I + H H^T)^-1 g = H (lambda I + H^T H)^-1 e

with e the unit vector of g's column: one system of s equations, and of H^T H one new row and column
an update. The second form loses nothing where lambda is small beside |g|^2; the first, expanded by
Woodbury, is a difference of two nearly equal vectors.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Natural:
    """What a subspace does with R before the rule sees it.

    length: s at most.  damping: lambda; with `relative`, times the mean of diag(H^T H). It is at
    least what rounding leaves of the trace. keep: columns of an earlier basis stay.
    State, which goes with the basis: ``projector.history`` (s, *R) and ``projector.products``.
    """

    length: int
    damping: float
    relative: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.damping <= 0:
            raise RecipeError("natural_galore: history is at least 1 and damping positive, got "
                              f"history={self.length}, damping={self.damping:g}")

    def numbers(self, shape: tuple[int, int]) -> int:
        """Elements of state beside an R of this shape."""
        return self.length * (shape[0] * shape[1] + self.length)

    def apply(self, R: Tensor, state: MutableMapping[str, Any], t: int, since: int) -> Tensor:
        """t, since: number of this update, of all and since the last refresh, from 1."""
        h, t = self.length, t if self.keep else since
        if "projector.history" not in state:
            state["projector.history"] = R.new_zeros(h, *R.shape)
            state["projector.products"] = R.new_zeros(h, h)
        history, products = state["projector.history"], state["projector.products"]
        at, s = (t - 1) % h, min(t, h)
        history[at] = R
        H = history[:s].view(s, -1)
        row = H @ R.reshape(-1)
        products[at, :s] = row
        products[:s, at] = row
        known = products[:s, :s].double()
        trace = known.diagonal().sum()
        size = trace / s if self.relative else 1.0
        damping = (self.damping * size + torch.finfo(R.dtype).eps * trace).clamp(
            min=torch.finfo(R.dtype).tiny)
        unit = torch.zeros(s, dtype=known.dtype, device=R.device)
        unit[at] = 1.0
        x = torch.linalg.solve(known + damping * torch.eye(s, dtype=known.dtype, device=R.device),
                               unit)
        return (x.to(R.dtype) @ H).view_as(R)
