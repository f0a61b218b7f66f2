"""Chains of reflections of a weight's inputs, as one product of rank 2 (see turn.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .turn import Turn


class Reflections(Turn):
    """``W' = V H_1 .. H_r``, ``H_i = I - 2 u_i u_i^T / |u_i|^2``; U (in, r) has the u_i.

    The product in compact form: with N the normalised columns of U,
    ``H_1 .. H_r = I - N S^-1 N^T``, ``S = I / 2 + (N^T N above its diagonal)``,
    so tokens see two thin products and a triangular solve of size r, whatever r is.

    Equal neighbours undo each other: U begins with pairs of equal columns, and is then the
    identity up to rounding.
    """

    def __init__(self, inp: int, rank: int):
        super().__init__()
        half = torch.empty(inp, rank // 2)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        self.U = nn.Parameter(half.repeat_interleave(2, dim=1))
        self.U.burnish_decay = False

    def unit(self) -> Tensor:
        """N: (in, r), in fp32 at least."""
        U = self.U.to(torch.promote_types(self.U.dtype, torch.float32))
        return U / torch.linalg.vector_norm(U, dim=0)

    def own(self) -> tuple[Tensor, Tensor]:
        N = self.unit()
        S = (N.t() @ N).triu(1) + torch.eye(N.shape[1], dtype=N.dtype, device=N.device) / 2
        return N, torch.linalg.solve_triangular(S, N.t(), upper=True)

    def before(self, x_NI: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        """``x (H_1 .. H_r)^T``."""
        N, back = own                                    # back = S^-1 N^T
        return x_NI - (x_NI @ back.t().to(x_NI.dtype)) @ N.t().to(x_NI.dtype)

    def low_rank_of(self, V: Tensor) -> tuple[Tensor, Tensor]:
        N, back = self.own()
        return back, -(V.to(N.dtype) @ N)

    def slant(self) -> Tensor:
        """``|I - N^T N|_F^2``: how far the axes are from standing at right angles."""
        N = self.unit()
        return (N.t() @ N - torch.eye(N.shape[1], dtype=N.dtype, device=N.device)).square().sum()
