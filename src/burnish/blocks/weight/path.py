"""Updates written as a path of activations: the forward says all, backward is made from it.

A method gives ``path(h) -> y``, built of ordinary differentiable operations on its own small
tensors; no autograd function is written by hand. Nothing of the path is kept: backward runs it
again from h, under a graph that lives as long as one layer's backward.

``h`` is the layer's input, (N, in), or, where a frozen matrix stands first (`into`), its product
with it: ``h = x into^T``, (N, r). Then h is all that is kept for backward, not x; and where there
are more tokens than r, what passes the path is the identity: ``path(h) = h P``, P (r, out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg import over_tokens
from ..matmul import linear, mm
from ..tape.replay import replay, rng_state
from .dropped import Dropping


class Path(Dropping):
    """``Delta x = path(into x)``, linear in x. Subclasses give :meth:`path`.

    draws: the path draws random numbers in training (dropout); they are drawn again in backward.
    One that drops so says `own_drops`; others drop by what stands around them (dropped.py).
    """

    tokenwise = True
    inp: int

    @property
    def into(self) -> Tensor | None:
        """A frozen (r, in) matrix that stands before everything that trains."""
        return None

    def path(self, h: Tensor) -> Tensor:
        """(N, out) from h (N, in), or (N, r) where there is an `into`, in h's precision."""
        raise NotImplementedError

    @property
    def draws(self) -> bool:
        return False

    @property
    def keeps_input(self) -> bool:
        return self.into is None and (self.draws or super().keeps_input)

    def product(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, x.shape[-1])
        h = h if self.into is None else h @ self.into.t().to(h.dtype)
        return self.path(h).view(*x.shape[:-1], -1)

    def behind(self) -> Tensor:
        """P (r, out), all that stands behind `into`."""
        first = self.theta()[0]
        return self.path(torch.eye(len(self.into), dtype=first.dtype, device=first.device))

    def _by_matrix(self, h_NR: Tensor) -> bool:
        return self.into is not None and not self.draws and len(h_NR) > len(self.into)

    def _pulled(self, g_NO: Tensor, h_NR: Tensor, dx_NI: Tensor | None, scale: float
                ) -> list[Tensor | None]:
        """The gradients by way of the matrix."""
        theta = self.theta()
        with torch.enable_grad():
            P = self.behind()
        if dx_NI is not None:
            back_NR = mm(g_NO, P.detach().t().to(g_NO.dtype))
            dx_NI.addmm_(back_NR, self.into.to(g_NO.dtype), alpha=scale)
        wanted = [t for t in theta if t.requires_grad]
        got: Any = ()
        if wanted and P.requires_grad:
            dP = over_tokens(g_NO, h_NR).t().to(P.dtype)
            got = torch.autograd.grad(P, wanted, dP if scale == 1 else dP * scale,
                                      allow_unused=True)
        it = iter(got)
        return [next(it, None) if t.requires_grad else None for t in theta]

    def dense(self) -> Tensor:
        """The update as (out, in): the path of every unit vector."""
        first = self.theta()[0]
        eye = torch.eye(self.inp, dtype=first.dtype, device=first.device)
        was, self.training = self.training, False
        try:
            return self.path(eye if self.into is None else self.into.t().to(eye.dtype)).t()
        finally:
            self.training = was

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if (into := self.into) is None:
            return self.pair()
        return into, self.behind().t()

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        state = rng_state(x_NI.device) if self.draws else None
        h = x_NI if self.into is None else linear(x_NI, self.into.to(x_NI.dtype))
        with torch.no_grad():
            if self._by_matrix(h):
                y_NO.addmm_(h.to(y_NO.dtype), self.behind().to(y_NO.dtype), alpha=scale)
            else:
                y_NO.add_(self.path(h), alpha=scale)
        wanted = any(t.requires_grad for t in self.theta())
        return (h if self.into is not None and wanted else None, state)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        h, state = kept
        theta, into = self.theta(), self.into
        wanted = [t for t in theta if t.requires_grad]
        if h is None:
            h = x_NI if into is None and x_NI is not None else \
                g_NO.new_zeros(g_NO.shape[0], self.inp if into is None else into.shape[0])
        if into is not None and self._by_matrix(h):
            return self._pulled(g_NO, h, dx_NI, scale)
        h = h.detach().requires_grad_(dx_NI is not None)
        with torch.enable_grad():
            if state is None:
                y = self.path(h)
            else:
                with replay(g_NO.device, state):
                    y = self.path(h)
        asked = [*wanted, *([h] if dx_NI is not None else [])]
        got = torch.autograd.grad(y, asked, g_NO if scale == 1 else g_NO * scale,
                                  allow_unused=True) if asked and y.requires_grad else ()
        it = iter(got)
        grads = [next(it, None) if t.requires_grad else None for t in theta]
        dh = next(it, None)
        if dx_NI is not None and dh is not None:
            dx_NI.add_(dh) if into is None else dx_NI.addmm_(dh, into.to(dh.dtype))
        return grads
