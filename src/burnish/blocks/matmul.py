"""Products of matrices by whichever library this machine has that is quickest at them.

On a CPU with AVX-512, torch gives fp32 products to MKL and keeps oneDNN for half precision. MKL has
its best kernels for Intel's processors. On others oneDNN does the fp32 ones quicker as well (Zen 4,
two cores, 6304 tokens, 768 and 3072 columns): frozen products by 6 to 10 %, with the bias added on
the way, and the thin ones of a factor chain, 8 columns wide, 1.5 to 4 times. On Intel's (Sapphire
Rapids, one core) it is MKL that is quicker: by 5 to 15 % forward, up to 2.4 times backward through
3072 columns, up to 6 times in the gradient of a thin factor. The numbers differ as two orders of
summation do.

Only for plain fp32 tensors of some size where nothing is traced or transformed: anything else is
torch's own product. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.

A weight that is held in another form (:class:`~burnish.blocks.gpu.coded.Coded`) multiplies itself.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.followed import compiling
from .gpu.coded import Coded
from .tape.functions import transformed

#: multiplications below which finding oneDNN's kernel costs more than it saves
LEAST = 1 << 23
#: columns that are laid the other way at a time: a copy too small to make a peak
STRIP = 256
_PLAIN = (Tensor, nn.Parameter)


def _maker() -> str:
    """Who made this CPU, as it says itself (GenuineIntel, AuthenticAMD); "" where that is not
    known."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()                   # Windows and macOS name it here


def _found() -> Any:
    """oneDNN's linear, where torch has it and this CPU is of the kind it was measured on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "Intel" in _maker():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_linear = _found()


def linear(x: Tensor, weight: Tensor | Coded, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: (N, in) and (out, in) to (N, out). Not differentiable: for the inside of
    autograd functions."""
    if isinstance(weight, Coded):
        return weight.linear(x, bias)
    if not (x.dim() == 2 and _served(x, weight)):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def mm(a: Tensor, b: Tensor | Coded) -> Tensor:
    """``a b``: (N, K) and (K, M) to (N, M)."""
    if isinstance(b, Coded):
        return b.back(a)
    if not (a.dim() == 2 and _served(a, b.t())):
        return a @ b
    return _linear(a, b.t(), None, "none", [], "")


def tn(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, the gradient of a weight: (N, M) and (N, K) to (M, K). oneDNN lays what it is
    given the other way, so it gets the narrower of the two, in strips."""
    if _linear is None or a.numel() * b.shape[1] < LEAST or not _plain(a, b) \
            or not (a.is_contiguous() and b.is_contiguous()):
        return a.t() @ b
    out = b.new_empty(a.shape[1], b.shape[1])
    if wide := a.shape[1] > b.shape[1]:
        a, b = b, a
    for part, done in zip(a.split(STRIP, 1), out.split(STRIP, int(wide)), strict=True):
        got = _linear(part.t(), b.t(), None, "none", [], "")
        done.copy_(got.t() if wide else got)
        del got                                      # one at a time
    return out


def served(x: Tensor, weight: Tensor) -> bool:
    """Is ``x W^T``, x of shape (..., in), a product that oneDNN does?"""
    return x.is_contiguous() and _served(x, weight)


def _served(x: Tensor, weight: Tensor) -> bool:
    """Is this a product that oneDNN does, without copying more than the smaller argument?"""
    return (_linear is not None and x.numel() * weight.shape[0] >= LEAST and _plain(x, weight)
            and (x.is_contiguous() or x.numel() <= weight.numel())
            and (weight.is_contiguous() or weight.t().is_contiguous()))


def _plain(a: Tensor, b: Tensor) -> bool:
    return (a.dtype is b.dtype is torch.float32
            and a.device.type == b.device.type == "cpu"
            and type(a) in _PLAIN and type(b) in _PLAIN
            and not compiling() and not transformed()
            and torch._C._get_mkldnn_enabled())
