"""Low-rank updates that a network makes of a few numbers of the sample, magnitude-invariantly.

    E(g) = [cos(pi g / 2), sin(pi g / 2)]                   |E(g)|^2 = the count of numbers, always
    e = leaky(W_2 leaky(W_1 E(g) + b_1) + b_2)              once for the whole model
    A = A_0 + W_A e        B = B_0 + W_B e                  y = s B A x

A plain network of homogeneous activations answers c g with c times its answer to g, so what it
generates grows with its input; of E(g) it does not, and A_0, B_0 learn what no g changes.

Letters: n samples, d numbers, H and C widths, I in, O out, R rank. Kept for backward: x; the
factors are generated again there, (I + O) R numbers per sample that live for one layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..tape.cast import uncast
from ..tape.executor import checkpoint
from ..weight.experts import spread

KEY = "gamma"


def encoded(g: Tensor) -> Tensor:
    """(n, d) numbers from 0 to 1 as (n, 2 d), of one length whatever they are."""
    return torch.cat([torch.cos(g * (math.pi / 2)), torch.sin(g * (math.pi / 2))], 1)


class Trunk(nn.Module):
    """e, (n, C), of numbers (n, d): two layers, Kaiming-normal by fan_out, biases 0."""

    def __init__(self, numbers: int, hidden: int, code: int):
        super().__init__()
        self.numbers = numbers
        self.inner, self.outer = nn.Linear(2 * numbers, hidden), nn.Linear(hidden, code)
        for linear in (self.inner, self.outer):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            nn.init.zeros_(linear.bias)

    def forward(self, g: Tensor) -> Tensor:
        with uncast(g):
            z = encoded(g.to(self.inner.weight.dtype))
            return F.leaky_relu(self.outer(F.leaky_relu(self.inner(z))))


class HyperChain(nn.Module):
    """``y = s B(g) A(g) x``: A_0 (R, I) Kaiming-uniform(sqrt 5), B_0 (O, R) zero, W_A (R I, C)
    Kaiming-normal by fan_out, W_B (O R, C) zero: nothing at the start, whatever g is.

    trunk: who holds it for others `owns` it, the others borrow it. rows: runs of outputs that it
    adds to where the linear is fused.
    """

    trunk: Trunk

    def __init__(self, trunk: Trunk, inp: int, out: int, rank: int, *, scale: float,
                 owns: bool, rows: tuple[tuple[int, int], ...] | None = None):
        super().__init__()
        if owns:
            self.trunk = trunk
        else:
            self.__dict__["trunk"] = trunk
        self.scale, self.out, self.rows = scale, out, rows
        n = out if rows is None else sum(b - a for a, b in rows)
        code = trunk.outer.out_features
        self.A0 = nn.Parameter(torch.empty(rank, inp).uniform_(-inp**-0.5, inp**-0.5))
        self.B0 = nn.Parameter(torch.zeros(n, rank))
        self.WA = nn.Parameter(torch.randn(rank * inp, code) * (rank * inp)**-0.5)
        self.WB = nn.Parameter(torch.zeros(n * rank, code))
        for p in (self.A0, self.B0):
            p.burnish_decay = False                  # what stands for the pre-trained weight

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return () if "trunk" in self._modules else tuple(self.trunk.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def factors(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """A (n, R, I) and B (n, O, R) for numbers (n, d)."""
        e = self.trunk(g)
        with uncast(e):
            A = F.linear(e, self.WA).view(-1, *self.A0.shape) + self.A0
            return A, F.linear(e, self.WB).view(-1, *self.B0.shape) + self.B0

    def run(self, x: Tensor) -> Any:
        """The update itself, (..., O) or as many outputs as `rows` say."""
        d = self.trunk.numbers
        g, by = context().by_entry(KEY, x, dims=0 if d == 1 else 1)
        g = g.unsqueeze(1) if d == 1 and g.dim() == 1 else g
        if g.dim() != 2 or g.shape[1] != d:
            raise RecipeError(f"{KEY!r} has entries of shape {tuple(g.shape[1:])}; expected {d} "
                              "numbers per sample")
        A, B = (t.to(x.dtype) for t in self.factors(g))
        y = by.flatten(1, -2) @ A.transpose(1, 2) @ B.transpose(1, 2) * self.scale
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def plain(self, g: tuple[float, ...]) -> dict[str, Tensor]:
        """A and B of one g as a chain of scale 1."""
        A, B = self.factors(torch.tensor([g], device=self.A0.device))
        return {"A": A[0], "B": spread(B[0].t() * self.scale, self.rows, self.out).t()}
