"""Whole input channels of a convolution that train, beside it: of its input those alone are kept.

    y = conv(x, W) + conv(x[:, at], V)

With groups a channel reaches the outputs of its own group; V has for each kept channel the kernels
to the outputs that it reaches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from ...core.site import Place
from ..choose.contribution import channels
from ..tape import cast
from ..tape.functions import applied, once_differentiable
from .backward import uncast
from .integer import Grid, codes, decoded
from .term import Term

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_INPUT = {1: grad.conv1d_input, 2: grad.conv2d_input, 3: grad.conv3d_input}
_WEIGHT = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}


class KernelSlice(Term):
    """V (k, out / groups * kernel) on the input channels `at` (k,), zero at the start.

    No channels: nothing trains, and the convolution keeps nothing of its input. `grid`: of the
    layer's input, where what holds the weight says one: the codes are kept then.
    """

    alongside = True
    grid: Grid | None = None

    def __init__(self, place: Place, at: Tensor):
        super().__init__()
        self.place, self.reached = place, place.out // place.groups
        self.at: Tensor
        self.register_buffer("at", at.sort().values.to(torch.int32))
        n = at.numel()
        self.V = nn.Parameter(torch.zeros(n, self.reached * place.kernel, device=at.device)) \
            if n else None
        self.counted = {"channels": n}

    def reads_on(self, grid: Grid | None) -> None:
        self.grid = grid

    def dense(self) -> Tensor:
        p = self.place
        if self.V is None:
            return torch.zeros(p.out, p.inp, device=self.at.device)
        whole = self.V.new_zeros(channels(p), self.V.shape[1]).index_copy(0, self.at.long(), self.V)
        return whole.view(p.groups, -1, self.reached, p.kernel).transpose(1, 2) \
            .reshape(p.out, p.inp)

    def beside(self, conv: Any, x: Tensor) -> Tensor | None:
        """What it adds to the output of `conv`, given x; None: nothing."""
        if self.V is None:
            return None
        out: Tensor = applied(_Beside, cast.autocast(x), self.V, self, conv)
        return out

    def kernels(self, V: Tensor) -> tuple[Tensor, int]:
        """(weight, groups) of the convolution that reads the kept channels."""
        if self.place.groups == 1:
            return V.view(len(V), -1, *self.place.axes).transpose(0, 1), 1
        return V.view(-1, 1, *self.place.axes), len(V)

    def outputs(self) -> Tensor | None:
        """Where its outputs go; None: there is one for each of the layer's, in order."""
        if self.place.groups == 1:
            return None
        group = self.at.long() // (channels(self.place) // self.place.groups)
        return (group.unsqueeze(1) * self.reached
                + torch.arange(self.reached, device=group.device)).flatten()


class _Beside(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, V: Tensor, term: KernelSlice, conv: Any) -> Tensor:
        ctx.term, ctx.conv, ctx.shape, ctx.grid = term, conv, x.shape, term.grid
        part = x.index_select(1, term.at)
        W, groups = term.kernels(V.to(x.dtype))
        made: Tensor = _CONV[len(conv.kernel_size)](part, W, None, conv.stride, conv.padding,
                                                    conv.dilation, groups)
        ctx.part = part.shape
        ctx.save_for_backward(codes(part, ctx.grid) if ctx.needs_input_grad[1] else None, V)
        if (to := term.outputs()) is None:
            return made
        y = made.new_zeros(len(made), term.place.out, *made.shape[2:])
        return y.index_add_(1, to, made)

    @staticmethod
    @once_differentiable
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        kept, V = ctx.saved_tensors
        term, conv, sides = ctx.term, ctx.conv, len(ctx.conv.kernel_size)
        to = term.outputs()
        g = g if to is None else g.index_select(1, to)
        W, groups = term.kernels(V.to(g.dtype))
        how = (g, conv.stride, conv.padding, conv.dilation, groups)
        dx = dV = None
        if ctx.needs_input_grad[0]:
            part = _INPUT[sides](ctx.part, W, *how)
            dx = g.new_zeros(ctx.shape).index_copy_(1, term.at.long(), part)
        if ctx.needs_input_grad[1]:
            dW = _WEIGHT[sides](decoded(kept, ctx.grid, g.dtype), W.shape, *how)
            dV = dW.transpose(0, 1).reshape(V.shape).to(V.dtype)     # of groups: there is one row
        return dx, dV, None, None
