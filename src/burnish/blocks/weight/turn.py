"""Functions of W told on tokens: what happens to x before the product, and to y behind it.

    y = after(before(x) V^T) + b,  V the base and all added terms

A method gives :meth:`Turn.before` or :meth:`Turn.after`, linear in their argument and built of
ordinary differentiable operations on its own small tensors; no autograd function is written by
hand, and V may be held in any form, since it is never turned itself. `of`, the same on the weight,
follows from them; it serves merging and modules that read their weight by themselves.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .backward import Pull, again, through
from .provided import Weighted, Wrap, linear


class Turn(Wrap):
    """``W' x = after(V before(x))``.

    own: what both are told is made of this term's tensors alone, small; evaluation makes it once.
    pull: gradients of x and of `own`, one tensor, from that of ``before(x, own)``, as
    :func:`~burnish.blocks.weight.backward.through` asks; None: `before` runs again under autograd.

    Kept for backward: x alone, for `before` (its result is made again); where an `after` is given
    the product is made again too. A term or a trained weight under a `before` keeps the turned x
    besides.
    """

    pull: ClassVar[Pull | None] = None

    def own(self, drawn: Any = None) -> Any:
        """What `before` and `after` read of this term. drawn: what this forward has drawn."""
        return ()

    def draw(self) -> Any:
        """What a forward draws once for all its tokens, small; None where nothing is drawn."""
        return None

    def before(self, x_NI: Tensor, own: Any) -> Tensor:
        """The tokens that the weight is given, (N, in)."""
        return x_NI

    def after(self, y_NO: Tensor, own: Any) -> Tensor:
        """What is made of the product, (N, out)."""
        return y_NO

    def of(self, V: Tensor) -> Tensor:
        """W' as an (out, in) tensor: ``before`` and ``after`` on unit vectors."""
        def eye(n: int) -> Tensor:
            return torch.eye(n, dtype=V.dtype, device=V.device)

        own = self.own()
        if type(self).before is not Turn.before:
            V = V @ self.before(eye(V.shape[-1]), own).t()
        if type(self).after is not Turn.after:
            V = self.after(eye(V.shape[-2]), own).t() @ V
        return V

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor:
        inner, theta, made = op.unwrapped, self.theta(), op.made(x)
        x2, drawn = x.reshape(-1, x.shape[-1]), self.draw()

        def own() -> Any:
            return made.small("own", self.own) if drawn is None else self.own(drawn)

        def before(x_NI: Tensor) -> Tensor:
            return self.before(x_NI, own())

        if type(self).after is Turn.after:
            turned = again(before, x2, theta) if self.pull is None else \
                through(x2, None, own, theta, self.before, self.pull)
            y = linear(turned, inner, bias, weight)
            return y.view(*x.shape[:-1], y.shape[-1])
        reads = theta if weight is None else (*theta, weight)

        def product(x_NI: Tensor) -> Tensor:
            mine = own()
            return self.after(linear(self.before(x_NI, mine), inner, None, weight), mine)

        y = again(product, x2, (*reads, *inner.theta()))
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
