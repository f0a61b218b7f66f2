"""Rows that tokens read through a ReLU instead of a softmax, so that nothing has to attend to them.

    a = relu(x (T + M(T))^T),   M(T) = (T A) B,   y = (a T) max_k a

The maximum stands for the share that softmax would give the rows, and passes no gradient. Scores
are made in fp32: they are not scaled, and y goes with the square of x. Kept for backward: x; what
is tokens x rows is made again there.

Letters: N tokens, D width, K rows, R rank of M.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tape.executor import checkpoint


class MemoryRead(nn.Module):
    """rows (K, D) begin N(0, 0.02^2), A (D, R) N(0, 1), B (R, D) zero."""

    def __init__(self, width: int, length: int, rank: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width) * 0.02)
        self.A = nn.Parameter(torch.randn(width, rank))
        self.B = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self, self.run, (x,), {})
        return y

    def run(self, x: Tensor) -> Tensor:
        """(..., D) from (..., D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        T = self.rows.to(wide)
        keys = T + (T @ self.A.to(wide)) @ self.B.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            a = torch.relu(x.to(wide) @ keys.t())
            y = (a @ T) * a.detach().amax(-1, keepdim=True)
        return y.to(x.dtype)


class Stretched(nn.Module):
    """``exp(c) h``, c a number that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))
        self.c.burnish_decay = False                 # type: ignore[attr-defined]

    def forward(self, h: Tensor) -> Tensor:
        return h * self.c.exp().to(h.dtype)
