"""What comes back to a weight beside ``back(N)``: residuals of a projected gradient, as objects.

A step in a subspace sees the gradient G, the basis with R = down(G), and N, what the rule made of
R. A residual says what the part that the subspace did not see adds to the step::

    W <- W - lr (scale back(N) + residual(rows))

panel by panel: it gives a function of a run of rows, so nothing of the weight's size is made.
Whoever writes a new one answers ``rows``; what it keeps between steps goes into the parameter's
state, under names that it lists in ``states``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .rules import Rows
from .subspace import Basis, panels


@dataclass
class Seen:
    """One step of one matrix, as a residual sees it.

    G: (m, n), as it came.  basis: R = down(G).  N: what the rule made of R.  norms: of R along the
    rank dimension, taken before the rule changed it.  axis: the rank dimension of R and N.
    height: entries of one panel.  correction: the rule's factor for its bias, which is in N.
    back: factor with which back(N) is stepped.
    """

    G: Tensor
    basis: Basis
    N: Tensor
    norms: Tensor
    axis: int
    height: int
    correction: float
    back: float

    def outside(self, factor: float = 1.0) -> Rows:
        """rows -> ``G - factor back(R)``. R is projected again: one product, no second buffer."""
        R = self.basis.down(self.G)
        return lambda lo, hi: self.G[lo:hi].to(R.dtype).sub(self.basis.up(R, lo, hi), alpha=factor)


class Residual(Protocol):
    """See the module."""

    #: names in the parameter's state
    states: ClassVar[tuple[str, ...]]

    def rows(self, seen: Seen, state: dict[str, Any]) -> Rows: ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The part outside the subspace itself, times `scale`: plain SGD there."""

    states: ClassVar[tuple[str, ...]] = ()

    scale: float = 1.0

    def rows(self, seen: Seen, state: dict[str, Any]) -> Rows:
        outside = seen.outside()
        return lambda lo, hi: outside(lo, hi).mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """The sign of the part outside the subspace, times `scale`. Where a subspace picks columns,
    rows or entries the two are exactly disjoint, and rounding dust there gets no sign."""

    states: ClassVar[tuple[str, ...]] = ()

    scale: float = 1.0

    def rows(self, seen: Seen, state: dict[str, Any]) -> Rows:
        outside, basis = seen.outside(), seen.basis
        return lambda lo, hi: basis.mute_(outside(lo, hi), lo, hi).sign_().mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """The gradient (all of it, or its part outside) at the rate the rule gave its image.

        phi_j = ||N_j|| / (||R_j|| + 1e-8)     per channel j of the long side, or once per tensor
        S = phi (G - back(R))   or   phi G
        S <- S / (max(||S|| / (||S_last|| + 1e-8), limit) / limit);    S_last is the limited one

    N here is without the correction of bias, which multiplies the step at the end. A norm that is
    not finite adds nothing and leaves the last one as it was.

    of: "outside" or "whole".  by: "channel" or "tensor".  scale: times S after the limiter, before
    it with scale_first.  limit: growth of ||S|| per step; 0 for none.
    literal: G - scale_of_back back(R) instead of the part outside.
    """

    states: ClassVar[tuple[str, ...]] = ("residual_norm",)

    of: Literal["outside", "whole"] = "outside"
    by: Literal["channel", "tensor"] = "channel"
    scale: float = 1.0
    scale_first: bool = False
    limit: float = 1.01
    literal: bool = False

    def rows(self, seen: Seen, state: dict[str, Any]) -> Rows:
        G, wide = seen.G, seen.N.dtype
        if self.by == "tensor":
            phi = torch.linalg.vector_norm(seen.N) / (torch.linalg.vector_norm(seen.norms) + 1e-8)
        else:
            phi = torch.linalg.vector_norm(seen.N, dim=seen.axis) / (seen.norms + 1e-8)
        phi = phi / seen.correction
        if self.scale_first:
            phi = phi * self.scale
        source: Rows = seen.outside(seen.back if self.literal else 1.0) \
            if self.of == "outside" else (lambda lo, hi: G[lo:hi].to(wide, copy=True))

        def scaled(lo: int, hi: int) -> Tensor:
            rows = source(lo, hi)
            return rows.mul_(phi if phi.dim() == 0 or seen.axis == 0 else phi[lo:hi, None])

        after = seen.correction * (1.0 if self.scale_first else self.scale)
        if not self.limit:
            return lambda lo, hi: scaled(lo, hi).mul_(after)
        square = sum(scaled(lo, hi).square().sum()
                     for lo, hi in panels(*G.shape, seen.height))
        shrink = self._limited(square.sqrt(), state)        # type: ignore[union-attr]
        return lambda lo, hi: scaled(lo, hi).mul_(shrink * after)

    def _limited(self, norm: Tensor, state: dict[str, Any]) -> Tensor:
        last = state.get("residual_norm")
        shrink = torch.ones_like(norm) if last is None else \
            self.limit / (norm / (last + 1e-8)).clamp(min=self.limit)
        shrink = torch.where(torch.isfinite(shrink), shrink, 0.0)
        kept = norm * shrink
        # infinity is no limit: a first norm that was not finite must not bind the next ones
        before = torch.full_like(kept, float("inf")) if last is None else last
        state["residual_norm"] = torch.where(torch.isfinite(kept), kept, before)
        return shrink


#: by the words a subspace may use
RESIDUALS = ("none", "sgd", "sign", "scaled")


def residual(word: Any, scale: float, limit: float) -> Residual | None:
    """The object a word stands for; an object stands for itself."""
    if not isinstance(word, str):
        return word
    return {"none": None, "sgd": Plain(scale=scale), "sign": Sign(scale=scale),
            "scaled": Scaled(scale=scale, limit=limit)}[word]
