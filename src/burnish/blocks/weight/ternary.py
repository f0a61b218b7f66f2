"""Weights of three values, and inputs in few bits, with gradients straight through.

    W_t = a (1[V > t] - 1[V < -t]),    t = 0.7 mean |V|,  a the mean of |V| over |V| > t
    x^  = s round(x / s),              s = max |x| / (2^(bits-1) - 1) of a token

both of numbers that are clipped to +-`edge` first; a gradient passes where nothing was clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pruned import packed as bits
from .pruned import unpacked as unbits
from .straight import Straight

#: of the mean of |V|: the threshold that is nearly the best for normal weights
SHARE = 0.7


class Ternary(Straight):
    """edge: where numbers are clipped.  dims: what shares a threshold and a value: the inputs of an
    output (1), or of a table the entries of a token (0, as tables are seen turned); None: all."""

    def __init__(self, input_bits: int, edge: float, dims: int | None):
        super().__init__()
        self.top, self.edge, self.dims = 2 ** (input_bits - 1) - 1, edge, dims

    def code(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        wide = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
        inside = bits(wide.abs() < self.edge)
        wide = wide.clamp(-self.edge, self.edge)
        s = (wide.abs().amax(-1, keepdim=True) / self.top).clamp_min(torch.finfo(wide.dtype).tiny)
        return (wide / s).round_().to(torch.int8), s, inside

    def opened(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, s, _ = kept
        return (codes.to(s.dtype) * s).to(dtype)

    def passed(self, g_NI: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return g_NI.masked_fill(~unbits(kept[2], g_NI.shape), 0)

    def rounded(self, made: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:
        W = made.clamp(-self.edge, self.edge)
        size = W.abs()
        large = size > SHARE * size.mean(self.dims, keepdim=True)
        count = large.sum(self.dims, keepdim=True).clamp_min(1)
        value = (size * large).sum(self.dims, keepdim=True) / count
        return W.sign() * large * value, made.abs() < self.edge
