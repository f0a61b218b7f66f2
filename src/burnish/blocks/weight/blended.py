"""Low-rank updates whose second factor is a blend of several, which layers share.

    h = x A^T,  p = mean over the tokens of softmax(h R^T),  y = s h sum_e p_e B_e

One blend serves all tokens of a call, so what a token gets depends on the others. Kept for
backward: x; everything else is made again there.

Letters: N tokens, I in, O out, E experts, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tape.executor import checkpoint
from .experts import spread


class Blended(nn.Module):
    """A (R, I), B (E, R, O), router (E, R). owns: which of A and B this module holds; others hold
    the rest. rows: runs of outputs of a fused linear with `out` of them."""

    A: Tensor
    B: Tensor

    def __init__(self, A: nn.Parameter, B: nn.Parameter, scale: float, owns: str,
                 rows: tuple[tuple[int, int], ...] | None, out: int):
        super().__init__()
        self.scale, self.rows, self.out, self.owns = scale, rows, out, owns
        experts, rank = B.shape[:2]
        self.router = nn.Parameter(torch.empty(experts, rank).uniform_(-rank**-0.5, rank**-0.5))
        for name, p in (("A", A), ("B", B)):
            if name in owns:
                self.register_parameter(name, p)
            else:
                self.__dict__[name] = p

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What others hold, for whoever runs this again in backward."""
        return tuple(getattr(self, n) for n in "AB" if n not in self.owns)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self, self.run, (x,), {})

    def run(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, x.shape[-1]) @ self.A.t().to(x.dtype)
        likes = (h @ self.router.t().to(h.dtype)).to(torch.promote_types(h.dtype, torch.float32))
        p = likes.softmax(1).mean(0)
        blend = torch.tensordot(p.to(self.B.dtype), self.B, 1)
        y = (h @ blend.to(h.dtype)) * self.scale
        return spread(y.view(*x.shape[:-1], -1), self.rows, self.out)
