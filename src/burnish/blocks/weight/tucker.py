"""Updates in Tucker form: a small core, and one thin factor for every axis of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from .path import Path


class Tucker(Path):
    """``Delta = s G x_1 U_1 x_2 U_2 .. x_N U_N`` over the axes (out, in / groups, kernel ...).

    G (r_1, .., r_N) is 0 at the start, U_i (d_i, r_i) Kaiming-normal (deviation 1 / sqrt(2 r_i)):
    no update, and a gradient for G. On tokens it runs as two thin products, ``x C^T U_1^T`` with
    C (r_1, in) all that is not U_1; `dropout` on x is drawn again in backward.
    """

    cheap_tile = True

    def __init__(self, place: Place, ranks: tuple[int, ...], scale: float, dropout: float):
        super().__init__()
        self.inp, self.scale, self.dropout = place.inp, scale, dropout
        sizes = (place.out, place.inp // place.kernel, *place.axes)
        self.G = nn.Parameter(torch.zeros(ranks))
        self.U = nn.ParameterList(nn.Parameter(torch.randn(d, r) / math.sqrt(2 * r))
                                  for d, r in zip(sizes, ranks, strict=True))
        for p in self.parameters():
            p.burnish_decay = False

    own_drops = True

    @property
    def draws(self) -> bool:
        return self.training and self.dropout > 0

    def middle(self) -> Tensor:
        """The core with the kernel's own axes: (r_out, r_in, kernel ...)."""
        K = self.G
        for axis, U in enumerate(list(self.U)[2:], 2):
            K = torch.movedim(torch.tensordot(K, U, ([axis], [1])), -1, axis)
        return K

    def pair(self) -> tuple[Tensor, Tensor]:
        C = torch.einsum("ri...,di->rd...", self.middle(), self.U[1])
        return C.flatten(1), self.U[0] * self.scale

    def dense(self) -> Tensor:
        return self.panel(0, self.inp)

    def panel(self, i0: int, i1: int) -> Tensor:
        C, B = self.pair()
        return B @ C[:, i0:i1]

    def path(self, h: Tensor) -> Tensor:
        C, B = self.pair()
        if self.draws:
            h = F.dropout(h, self.dropout, True)
        return h @ C.t().to(h.dtype) @ B.t().to(h.dtype)

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        with torch.no_grad():
            return self.panel(i0, i1)

    def beside(self, conv: Any, x: Tensor) -> Tensor:
        """The same beside a convolution, on what it reads: 1 x 1 (in -> r_in), the kernel of the
        core with the convolution's stride, padding, dilation and groups, 1 x 1 (r_out -> out)."""
        if self.draws:
            x = F.dropout(x, self.dropout, True)
        g, ones = conv.groups, (1,) * len(conv.kernel_size)
        run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(ones)]
        down, up = self.U[1].t().repeat(g, 1).to(x.dtype), (self.U[0] * self.scale).to(x.dtype)
        h = run(x, down.view(*down.shape, *ones), groups=g)
        h = conv._conv_forward(h, self.middle().to(x.dtype).repeat(g, 1, *ones), None)
        return run(h, up.view(*up.shape, *ones), groups=g)

    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        h = F.embedding(index, self.U[1], padding)
        return h @ self.middle().t() @ (self.U[0] * self.scale).t()
