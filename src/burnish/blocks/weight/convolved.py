"""A factor chain beside a convolution, on what the convolution reads.

Added to the weight a chain costs nothing extra, and that is how it runs; dropout on its input has
no form as a weight, so with dropout the two factors are convolutions of their own: A with the
module's kernel, stride, padding, dilation and groups, B of kernel 1.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .factor import Chain
from .shards import Shards
from .tucker import Tucker

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolved(term: Chain | Shards | Tucker, conv: Any, x: Tensor) -> Tensor:
    """``s conv_1(conv(drop(x), A), B)``; x as the module is given it, with or without a batch.

    A (R, in / groups * kernel) serves every group, B (out, R) its rows group by group:
    ``Delta = s B A`` row by row, as the chain has it for a weight of (out, in / groups * kernel).
    """
    if isinstance(term, Tucker):
        return term.beside(conv, x)
    if term.training and term.dropout:
        x = F.dropout(x, term.dropout, True)
    down, up = term.factors()
    g, R = conv.groups, down.shape[0]
    A = down.to(x.dtype).view(R, conv.in_channels // g, *conv.kernel_size)
    h = conv._conv_forward(x, A.repeat(g, *(1,) * (A.dim() - 1)) if g > 1 else A, None)
    B = up.to(x.dtype).view(*up.shape, *(1,) * len(conv.kernel_size))
    return _POINTWISE[len(conv.kernel_size)](h, B, groups=g)
