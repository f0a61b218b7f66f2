"""Inputs of linears as one number for a run of their channels: rank-1 projections of sub-tokens.

A token x (D,) is cut in G sub-tokens of d = ceil(D / G) channels (zeros behind the last). Of each
its product with one direction v (d,), |v| = 1, is kept, and what backward reads is made of that:

    z_g = x_g v,    x^_g = s z_g v^T

so N G numbers and v are kept of N D. What does not lie along v is lost: the gradient is off in the
mean too. v is the mean of the input's own sub-tokens, or drawn once for each d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampled import Sampled
from .saved import Policy


def subtokens(x: Tensor, groups: int) -> Tensor:
    """(N, D) as (N, G, d)."""
    d = -(-x.shape[1] // groups)
    return F.pad(x, (0, groups * d - x.shape[1])).unflatten(1, (groups, d))


@torch.no_grad()
def mean_direction(x: Tensor, groups: int) -> Tensor:
    """v (d,), in fp32 at least: the mean of the sub-tokens of (N, D), of length 1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = subtokens(x, groups).mean((0, 1), dtype=wide)
    norm = torch.linalg.vector_norm(v)
    flat = torch.full_like(v, v.numel() ** -0.5)              # where they cancel: all alike
    return torch.where(norm > 0, v / norm.clamp_min(torch.finfo(wide).tiny), flat)


class _Runs:
    """(N, G) products and v, waiting where the inner policy says."""

    def __init__(self, x: Tensor, v: Tensor, groups: int, scale: float, inner: Policy):
        self.width, self.scale = x.shape[1], scale
        v = v.to(x.dtype)
        self.held = [inner.pack(t) for t in (subtokens(x, groups) @ v, v)]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """(N, width) of them."""
        z, v = (h.open() for h in self.held)
        made = (z.unsqueeze(-1) * v).flatten(1)[:, : self.width]
        return made if self.scale == 1 else made * self.scale


class Projected(Sampled):
    """groups: G. scale: s. drawn: v is drawn, once for each d by the seed, instead of the mean of
    each input's sub-tokens. What a linear reads and nobody keeps anyway is projected, once for all
    its readers; a ReLU in front of one keeps a bit a number, exactly, instead of it."""

    beside = "inputs that are kept for backward are projected (velora)"

    def __init__(self, groups: int = 64, scale: float = 1.0, drawn: bool = False, seed: int = 0):
        super().__init__(seed=seed)
        self.groups, self.scale, self.drawn = groups, scale, drawn

    def __reduce__(self) -> tuple:
        return type(self), (self.groups, self.scale, self.drawn, self.seed), \
            {"inner": self.inner, "step": self.step}

    def _short(self, x: Tensor) -> Any:
        v = self._draw(x) if self.drawn else mean_direction(x, self.groups)
        return _Runs(x, v, self.groups, self.scale, self.inner)

    def _draw(self, x: Tensor) -> Tensor:
        d = -(-x.shape[1] // self.groups)
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + d) % 2**63)
        v = torch.randn(d, generator=g, dtype=torch.float32, device="cpu")
        return (v / torch.linalg.vector_norm(v)).to(x.device)

    def _smaller(self, t: Tensor) -> bool:
        n, width = t.numel() // t.shape[-1], t.shape[-1]
        return n * self.groups + -(-width // self.groups) < t.numel()
