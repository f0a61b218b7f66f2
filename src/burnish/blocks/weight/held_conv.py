"""A convolution whose weight is frozen: backward keeps neither the weight nor the input.

    dx = g * W (transposed), db = sum of g

Torch's own keeps its input whoever wants a gradient. Here the weight is asked for again, so one
that a storage decodes lives no longer than a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from ...core.call import current
from ...core.followed import compiling
from ..tape import cast
from ..tape.functions import applied, once_differentiable, transformed
from ..tape.notes import Seen
from .backward import as_then, uncast

#: dx by the number of a kernel's sides
_INPUT = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}


def served(conv: Any, x: Tensor) -> bool:
    """Has it a form here? Padding by other numbers than zeros, or said in words, has none, nor has
    an input without a batch, nor anything under a transform."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str) \
        and x.dim() == len(conv.kernel_size) + 2 \
        and not compiling() and not transformed()


def convolved(conv: nn.Module, x: Tensor, weight: Callable[[], Tensor], held: Sequence[Tensor]
              ) -> Tensor:
    """What `conv` makes of x with the frozen weight that ``weight()`` gives, as stored; held: the
    tensors that it reads."""
    out: Tensor = applied(_Conv, cast.autocast(x), conv.bias, conv, weight, held)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, conv: Any,
                weight: Callable[[], Tensor], held: Sequence[Tensor]) -> Tensor:
        ctx.conv, ctx.weight, ctx.call, ctx.shape = conv, weight, current(), x.shape
        ctx.seen = Seen(held if ctx.needs_input_grad[0] else ())
        W, b = weight().to(x.dtype), None if bias is None else bias.to(x.dtype)
        y: Tensor = conv._conv_forward(x, W, b)
        return y

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        need_x, need_b, *_ = ctx.needs_input_grad
        conv, sides = ctx.conv, len(ctx.conv.kernel_size)
        ctx.seen.check(ctx.seen.tensors, lambda k: "what holds a convolution's frozen weight")
        dx = None if not need_x else _INPUT[sides](
            ctx.shape, ctx.weight().to(g.dtype), g, conv.stride, conv.padding, conv.dilation,
            conv.groups)
        over = (0, *range(2, g.dim()))
        return dx, g.sum(over) if need_b else None, None, None, None
