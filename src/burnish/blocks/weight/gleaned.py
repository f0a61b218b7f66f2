"""Low-rank updates whose factors are read off the weight itself, by something that trains.

    W' = V + B A,  (A, B) = factors(V),  A (r, in), B (out, r),  V the base and all added terms

A method gives :meth:`Gleaned.factors`, built of ordinary differentiable operations. The factors are
made once a forward and once more in backward, where they meet their gradients; tokens see a plain
chain of rank r. Neither V nor anything of its size lives until backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backward import remade
from .factor import Chain
from .provided import Weighted, straight
from .term import Term, Wrap


class Given(Chain):
    """``Delta = B A`` of factors that somebody else makes, for one forward."""

    def __init__(self, A: Tensor, B: Tensor):
        Term.__init__(self)
        self.A, self.B, self.scale, self.dropout = A, B, 1.0, 0.0   # type: ignore[assignment]

    def theta(self) -> tuple[Tensor, ...]:
        return self.A, self.B


class Gleaned(Wrap):
    """Subclasses give :meth:`factors`."""

    def factors(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of V, which is in this term's precision."""
        raise NotImplementedError

    def of(self, V: Tensor) -> Tensor:
        A, B = self.low_rank_of(V)
        return V + (B @ A).to(V.dtype)

    def low_rank_of(self, V: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors(V.to(torch.promote_types(V.dtype, self.theta()[0].dtype)))

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor:
        inner = op.unwrapped

        def made() -> tuple[Tensor, Tensor]:
            return self.low_rank_of(inner.dense(op.base() if weight is None else weight))

        reads: Sequence[Tensor] = (*self.theta(), *inner.theta())
        reads = reads if weight is None else (*reads, weight)
        A, B = remade(made, tuple(reads)) if torch.is_grad_enabled() else \
            op.made(x).small("factors", made)
        terms = [*inner.terms, (Given(A, B), 1.0)]
        whole = Weighted(op.base, terms, None, op.held, coded=op.coded)
        return straight(x, x, whole, bias, weight)
