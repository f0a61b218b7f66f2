"""Products of matrices by whichever library this machine has that is quickest at them.

On a CPU with AVX-512, torch gives fp32 products to MKL and keeps oneDNN for half precision. oneDNN
does the fp32 ones quicker as well (Zen 4, two cores, 6304 tokens, 768 and 3072 columns): frozen
products by 6 to 10 %, with the bias added on the way, and the thin ones of a factor chain, 8
columns wide, 1.5 to 4 times. The numbers differ as two orders of summation do.

Only for plain fp32 tensors of some size where nothing is traced or transformed: anything else is
torch's own product. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tape.functions import transformed

#: multiplications below which finding oneDNN's kernel costs more than it saves
LEAST = 1 << 23
_PLAIN = (Tensor, nn.Parameter)


def _found() -> Any:
    """oneDNN's linear, where torch has it and this CPU is of the kind it was measured on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_linear = _found()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: (N, in) and (out, in) to (N, out). Not differentiable: for the inside of
    autograd functions."""
    if _linear is None or not _served(x, weight):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``: (N, K) and (K, M) to (N, M)."""
    if _linear is None or not _served(a, b.t()):
        return a @ b
    return _linear(a, b.t(), None, "none", [], "")


def _served(x: Tensor, weight: Tensor) -> bool:
    """Is this a product that oneDNN does, without copying more than the smaller argument?"""
    return (x.dim() == 2 and x.shape[0] * weight.numel() >= LEAST
            and x.dtype is weight.dtype is torch.float32
            and x.device.type == weight.device.type == "cpu"
            and type(x) in _PLAIN and type(weight) in _PLAIN
            and (x.is_contiguous() or x.numel() <= weight.numel())
            and (weight.is_contiguous() or weight.t().is_contiguous())
            and not torch.compiler.is_compiling() and not transformed()
            and torch._C._get_mkldnn_enabled())
