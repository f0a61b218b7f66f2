"""Sums of rank-one parts, each divided by its own length: how far they go is one number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .paired import Paired

#: what a length counts as at least
LEAST = 1e-4


class Normed(Paired):
    """``Delta = lam / r sum_i b_i a_i^T / (|b_i| |a_i|) diag(norms)``, lengths from LEAST on.

    A (r, in), B (out, r), lam (1,) train; norms (in,) is kept in files. As one pair: the lengths
    of A's rows and of norms go into A, all the rest into B, so tokens meet two thin products.
    """

    def __init__(self, out: int, rank: int, bound: float, norms: Tensor, dropout: float):
        super().__init__()
        self.inp, self.dropout = norms.numel(), dropout
        edge = self.inp**-0.5
        self.A = nn.Parameter(torch.empty(rank, self.inp).uniform_(-edge, edge))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.lam = nn.Parameter(torch.full((1,), float(bound)))
        for p in self.parameters():
            p.burnish_decay = False                      # type: ignore[attr-defined]
        self.register_buffer("norms", norms)

    def pair(self) -> tuple[Tensor, Tensor]:
        a = torch.linalg.vector_norm(self.A, dim=1).clamp(min=LEAST)
        b = torch.linalg.vector_norm(self.B, dim=0).clamp(min=LEAST)
        return self.A * self.norms, self.B * (self.lam / len(self.A) / (a * b))
