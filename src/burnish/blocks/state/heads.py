"""Bottlenecks beside a linear, of its input or of its own result.

Without an activation they are low-rank heads, which both fold into it:

    f(h) = s (B drop(A h + a) + b)

h = x:        W' = W + s B A        bias' = bias + s (B a + b)
h = W x + c:  W' = W + s B A W      bias' = c + s (B A c + B a + b)

Kept for backward are h and R numbers per token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import CheckError
from ..weight.experts import spread
from .bottleneck import Bottleneck
from .gates import out_first, value_of

Rows = tuple[tuple[int, int], ...] | None


class Around(Bottleneck):
    """``f(h) = s (B drop(act(A h + a)) + b)``: down (R, in), up (out, R); nothing at the start.

    of: "input" or "output" of the linear it stands beside, which has `out` outputs. rows: runs of
    these that it adds to, and of which alone it reads; None for all. Other words: a bottleneck's.
    """

    def __init__(self, inp: int, out: int, width: int, *, of: Literal["input", "output"],
                 rows: Rows = None, **bottleneck: Any):
        n = out if rows is None else sum(b - a for a, b in rows)
        super().__init__(inp if of == "input" else n, width, n, **bottleneck)
        self.of, self.out, self.rows = of, out, rows

    def forward(self, h: Tensor) -> Tensor:
        return spread(super().forward(self._read(h, -1)), self.rows, self.out)

    def _read(self, h: Tensor, axis: int) -> Tensor:
        """The outputs of a fused linear that are its own, along one axis."""
        if self.of == "input" or self.rows is None:
            return h
        return torch.cat([h.narrow(axis, a, b - a) for a, b in self.rows], axis)


class Head(Around):
    """The same without an activation. init of A: "kaiming" uniform (a = sqrt 5), "normal" (0.02) or
    "xavier" uniform; B, a and b are zero."""

    def __init__(self, inp: int, out: int, rank: int, *, of: Literal["input", "output"],
                 scale: float, dropout: float, bias: bool, init: str, rows: Rows = None):
        super().__init__(inp, out, rank, of=of, rows=rows, act="linear", scale=scale,
                         dropout=dropout, bias=bias)
        if init == "normal":
            nn.init.normal_(self.down.weight, std=0.02)
        elif init == "xavier":
            nn.init.xavier_uniform_(self.down.weight)

    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write the head into the module's weight (and bias): exact, up to one rounding.

        values: parameter name -> value as stored; missing ones start from the module's own.
        """
        stored = value_of(module, values, "weight")
        wide: Any = torch.promote_types(stored.dtype, torch.float32)
        rows_first = out_first(module, stored)
        W = (stored if rows_first else stored.t()).to(wide)
        A, B = self.down.weight.to(wide), self.up.weight.to(wide) * self.scale
        added = B @ (A if self.of == "input" else A @ self._read(W, 0))
        W = W + spread(added.t(), self.rows, self.out).t()
        values["weight"] = (W if rows_first else W.t()).to(stored.dtype)
        bias = values.get("bias", getattr(module, "bias", None))
        shift = None
        if self.down.bias is not None:
            shift = B @ self.down.bias.to(wide) + self.up.bias.to(wide) * self.scale
        if self.of == "output" and bias is not None:
            moved = B @ (A @ self._read(bias.detach().to(wide), 0))
            shift = moved if shift is None else shift + moved
        if shift is None:
            return
        if bias is None and "bias" not in module._parameters:
            raise CheckError(f"cannot merge: {type(module).__name__} has no bias to hold a shift")
        shift = spread(shift, self.rows, self.out)
        values["bias"] = shift.to(stored.dtype) if bias is None else \
            (bias.detach().to(wide) + shift).to(bias.dtype)
