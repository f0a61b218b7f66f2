"""Neurons that learn, by a Hebbian rule, in which directions the inputs of a layer vary.

    y = H x,  dH = rate mean_n y_n (x_n - H^T y_n)^T          Oja's subspace rule

H (k, I) comes to be an orthonormal basis of the k leading principal directions of x, and ``x -
H^T H x`` is what they leave of it. Neurons that are there already are part of the sum that is taken
from x and stay as they are; those that learn begin outside of their span, and find what is left
(Xiao et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Lateral:
    """The neurons of one layer's inputs. settled: how many of them learn no more."""

    def __init__(self, inp: int, like: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        self.H = torch.zeros(0, inp, dtype=wide, device=like.device)
        self.settled = 0

    def grow(self, count: int, draw: torch.Generator) -> None:
        """So many more, drawn outside of what is there, which has settled."""
        self.settled, inp = self.H.shape
        count = min(count, inp - self.settled)
        new = torch.randn(count, inp, generator=draw, dtype=torch.float64).to(self.H) / inp**0.5
        self.H = torch.cat([self.H, self.off(new)])

    def off(self, D_OI: Tensor) -> Tensor:
        """Rows without what they have in the neurons' directions: ``D - D H^T H``."""
        return D_OI - (D_OI @ self.H.T) @ self.H

    def learn(self, x_NI: Tensor, rate: float) -> None:
        """One step of the rule on a batch, in units of what the settled neurons leave of it."""
        x = x_NI.to(self.H)
        old = self.H[:self.settled]
        left = x - (x @ old.T) @ old
        size = left.square().sum(-1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        x = x / size
        new = self.H[self.settled:]
        y_NK = x @ new.T
        self.H[self.settled:] += rate / len(x) * y_NK.T @ (left / size - y_NK @ new)
