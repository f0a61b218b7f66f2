"""Updates that are the entrywise product of two products of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .columns import Columns


class Hadamard(Columns):
    """``Delta = s (B1 A1) * (B2 A2)``, entry by entry: B_i (out, r), A_i (r, in), A_i with its
    kernel flattened. tucker: ``A_i[r, (d, k)] = sum_q T_i[r, q, k] V_i[q, d]``, V_i (r, channels).
    All are normal: B1 of deviation 0.1, T_i too, B2 zero, the others of 1.
    """

    def __init__(self, out: int, inp: int, rank: int, scale: float, kernel: int, tucker: bool):
        super().__init__()
        self.inp, self.scale, self.kernel = inp, scale, kernel
        right = [(rank, rank * kernel), (rank, inp // kernel)] if tucker and kernel > 1 \
            else [(rank, inp)]

        def half(std: float) -> nn.ParameterList:
            made = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in ((out, rank), *right))
            with torch.no_grad():
                made[0].mul_(std)
                for core in list(made)[1:-1]:
                    core.mul_(0.1)
            for p in made:
                p.burnish_decay = False
            return made

        self.first, self.second = half(0.1), half(0.0)

    def right(self, half: nn.ParameterList) -> Tensor:
        """A_i: (r, in)."""
        if len(half) == 2:
            return half[1]
        T, V = half[1], half[2]
        r = V.shape[0]
        return torch.einsum("rqk,qd->rdk", T.view(r, r, self.kernel), V).flatten(1)

    def columns(self, i0: int, i1: int) -> Tensor:
        one, two = (h[0] @ self.right(h)[:, i0:i1] for h in (self.first, self.second))
        return one * two * self.scale
