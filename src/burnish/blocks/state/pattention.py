"""Attention to parameters: a layer whose weights are keys and values that tokens attend to.

    A = x K^T        y = gelu(A tau / sqrt(sum_k A_k^2)) V

The norm is over the parameters, in fp32. Letters: N tokens, I in, O out, P parameter tokens.
Kept for backward: x; the P-wide rest is made again there, at P / I of the price of the layer that
it stands beside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tape.executor import checkpoint
from ..weight.experts import spread

#: what keeps the root from zero, far below the rounding of any norm that is none
EPS = 1e-8
#: deviation of keys at the start, and of the values of tokens that are added
SPREAD = 0.02


class Pattention(nn.Module):
    """``y = s gelu(norm(x K^T)) V`` with K (P, I) normal, V (P, O) zero: nothing at the start.

    tau: of the norm, the root of P where layers begin. Tokens whose key is zero change no answer
    as long as tau stays. rows: runs of outputs that it adds to where the linear is fused.
    """

    def __init__(self, inp: int, out: int, tokens: int, tau: float, scale: float,
                 rows: tuple[tuple[int, int], ...] | None = None):
        super().__init__()
        self.tau, self.scale, self.out, self.rows = tau, scale, out, rows
        n = out if rows is None else sum(b - a for a, b in rows)
        self.K = nn.Parameter(torch.randn(tokens, inp) * SPREAD)
        self.V = nn.Parameter(torch.zeros(tokens, n))

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The layer itself, (..., O) or as many of them as `rows` say."""
        A = F.linear(x, self.K.to(x.dtype))
        wide = A.to(torch.promote_types(A.dtype, torch.float32))
        norm = (wide.square().sum(-1, keepdim=True) + EPS).rsqrt() * self.tau
        return F.linear(F.gelu((wide * norm).to(A.dtype)), self.V.t().to(A.dtype)) * self.scale

    @torch.no_grad()
    def grown(self, tokens: int) -> dict[str, Tensor]:
        """K and V with as many tokens more as make it `tokens`: keys zero, values normal."""
        more = tokens - len(self.K)
        return {"K": torch.cat([self.K, self.K.new_zeros(more, self.K.shape[1])]),
                "V": torch.cat([self.V, torch.randn(more, self.V.shape[1]).to(self.V) * SPREAD])}
