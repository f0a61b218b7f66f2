"""What a device's kernels keep and take, where the CPU's stand in for them.

A step for CUDA is simulated where there is no CUDA, on tensors that say they are the CPU's.
Composite operators then choose the CPU's kernels, which keep other tensors for backward. Each entry
here is one such difference; files are PyTorch's, below ``aten/src/ATen`` (native where no folder is
named):

scaled_dot_product_attention (``transformers/cuda/sdp_utils.cpp``)
    16 bits without a mask: flash; else memory-efficient; else written out with a matrix of scores.
    Dropout is inside the first two. The CPU's flash takes masks and no dropout.
flash attention's backward (``transformers/cuda/flash_attn/flash_api.cpp``, ``mha_bwd``)
    sums dq in fp32 with one number a query beside it; where heads share keys and values, their
    gradients are made per query head first.
dropout (``Dropout.cpp``, ``is_fused_kernel_acceptable``)
    one operator with a mask of one byte; the CPU keeps the noise in the input's dtype.
rms_norm (``layer_norm.cpp``, ``rms_norm_symint``)
    one operator that keeps its input and one fp32 number a row.
products (``cuda/CublasHandlePool.cpp``)
    cuBLAS has a workspace from the same allocator, one for each thread that calls it (forward's and
    backward's): 8.125 MiB, on Hopper 32.
convolutions on the CPU
    oneDNN reorders their tensors into buffers of its own.
collectives on the CPU (gloo, ``torch/csrc/distributed/c10d/ProcessGroupGloo.cpp``)
    a reduce-scatter is an all-reduce of a copy, an all-gather fills a buffer of its own first. NCCL
    works in place.

Not declared: what the memory-efficient kernel takes in backward, cuDNN's workspaces.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..blocks.tape.functions import once_differentiable

_aten = torch.ops.aten
MiB = 1 << 20


# -- memory inside a kernel -----------------------------------------------------------------------
def _convolution(args: tuple, out: Tensor) -> int:
    """oneDNN reorders weights and result into blocks, but for 1 x 1 kernels."""
    return out.nbytes + args[1].nbytes if math.prod(args[1].shape[2:]) > 1 else 0


def _convolution_backward(args: tuple, out: Any) -> int:
    g, x, w = args[:3]
    return g.nbytes + x.nbytes + w.nbytes if math.prod(w.shape[2:]) > 1 else 0


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _flash_backward(args: tuple, out: Any) -> int:
    """dq is summed in fp32, padded to tiles; the sums of g * out likewise; grouped keys and values
    get their gradients per query head first."""
    q, k = args[1], args[2]
    b, heads, length, width = q.shape
    rows, columns = _up(length, 128), _up(width, 32)
    sums = 4 * b * heads * rows * (columns + 1)
    expanded = 2 * b * heads * k.shape[2] * _up(width, 8) * k.element_size()
    return sums + (expanded if k.shape[1] != heads else 0)


def _ctc_backward(args: tuple, out: Any) -> int:
    """The sums from behind, as large as those from the front (``LossCTC.cpp``, ``LossCTC.cu``)."""
    return args[6].nbytes


def _reduce_scatter(args: tuple, out: Any) -> int:
    return args[1].nbytes


def _all_gather(args: tuple, out: Any) -> int:
    return args[0].nbytes


# -- kernels that keep other tensors --------------------------------------------------------------
class _RMSNorm(torch.autograd.Function):
    """``y = w x / rms(x)``: x and one fp32 number a row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(rows, dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        wanted = weight is not None and ctx.needs_input_grad[2]
        return (torch.empty_like(x) if ctx.needs_input_grad[0] else None, None,
                torch.empty_like(weight) if wanted else None)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None,
              eps: float | None = None) -> Tensor:
    if not isinstance(x, FakeTensor) or weight is not None and weight.dtype != x.dtype:
        return _aten.rms_norm.default.decompose(x, shape, weight, eps)
    return _RMSNorm.apply(x, tuple(x.shape[: x.dim() - len(shape)]), weight)


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if not isinstance(x, FakeTensor) or not train or not 0 < p < 1 or not x.numel():
        return _aten.dropout.default.decompose(x, p, train)
    return _aten.native_dropout(x, p, train)[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
               enable_gqa: bool = False) -> Tensor:
    if not isinstance(q, FakeTensor):
        return _aten.scaled_dot_product_attention.default.decompose(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    way = attention(q, k, v, attn_mask, enable_gqa)
    if way == "written out":
        return _aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    if way == "flash":
        width, pad = q.shape[-1], -q.shape[-1] % 8
        if pad:                               # rows of 8 numbers; the scale is the true width's
            scale = scale if scale is not None else width ** -0.5
            q, k, v = (torch.constant_pad_nd(t, [0, pad]) for t in (q, k, v))
        out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal,
                                                        scale=scale)[0]
        return out[..., :width] if pad else out
    if attn_mask is not None and attn_mask.dtype == torch.bool:      # a bias in the queries' dtype
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
    return _aten._scaled_dot_product_efficient_attention(
        q, k, v, None if attn_mask is None else _bias(attn_mask, q, k), _grad(q, k, v), dropout_p,
        is_causal, scale=scale)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> str:
    """Which of its kernels CUDA chooses: "flash", "efficient" or "written out" (with a matrix of
    scores); default order and limits, on Ampere and later."""
    same = q.shape[-1] == k.shape[-1] == v.shape[-1]
    short = q.dtype in (torch.float16, torch.bfloat16)
    whole = q.dim() == 4 and 0 not in (*q.shape, *k.shape)
    heads = q.shape[-3] == k.shape[-3] if q.dim() > 2 else True
    if whole and short and same and mask is None and q.shape[-1] <= 256 and (heads or grouped):
        return "flash"
    align = 8 if short else 4
    if whole and heads and q.dtype != torch.float64 \
            and q.shape[-1] % align == 0 and v.shape[-1] % align == 0:
        return "efficient"
    return "written out"


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Rows of a bias begin at multiples of 16 entries: it is copied into wider rows where not."""
    over = -k.shape[-2] % 16
    if over and mask.shape[-1] != 1:
        mask = torch.constant_pad_nd(mask, [0, over])[..., : k.shape[-2]]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# -- devices --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Device:
    """block: bytes the allocator counts in. caches: its allocator is PyTorch's caching one.
    workspace: bytes of the library of products, for each thread.
    scratch: operator -> bytes it takes and gives back inside itself, where of an activation's size.
    composites: operator -> what is run in its place on another device's tensors.
    """

    block: int = 1
    caches: bool = False
    workspace: int = 0
    scratch: dict[Any, Callable[[tuple, Any], int]] = field(default_factory=dict)
    composites: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


#: what processes say to each other; nothing where torch was built without them
COLLECTIVES = frozenset(getattr(torch.ops.c10d, name) for name in (
    "allreduce_", "broadcast_", "barrier", "_allgather_base_", "_reduce_scatter_base_",
    "allgather_", "reduce_scatter_", "gather_", "scatter_", "alltoall_", "alltoall_base_")
    if torch.distributed.is_available())
_GLOO = {packet: takes for packet in COLLECTIVES for name, takes in (
    ("_reduce_scatter_base_", _reduce_scatter), ("_allgather_base_", _all_gather))
    if packet.__name__ == name}

DEVICES = {
    "cpu": Device(scratch={_aten.convolution: _convolution,
                           _aten.convolution_backward: _convolution_backward,
                           _aten._ctc_loss_backward: _ctc_backward, **_GLOO}),
    "cuda": Device(
        block=512, caches=True, workspace=8 * MiB + MiB // 8,
        scratch={_aten._scaled_dot_product_flash_attention_backward: _flash_backward,
                 _aten._ctc_loss_backward: _ctc_backward},
        composites={"scaled_dot_product_attention": _attention, "dropout": _dropout,
                    "rms_norm": _rms_norm}),
}
HOPPER_WORKSPACE = 32 * MiB
#: operators that take memory inside themselves, on one device or another
INSIDE = frozenset(op for d in DEVICES.values() for op in d.scratch)
#: what calls the library of products
PRODUCTS = frozenset({_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.addbmm, _aten.mv,
                      _aten.addmv, _aten.dot})


def device(kind: str | None) -> Device:
    """The table's entry for a device type; one that is not there has nothing to declare."""
    return DEVICES.get(kind or "", Device())


def workspace(kind: str) -> int:
    """Bytes of the library of products for one thread; here, where such a device is here."""
    if kind == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        return HOPPER_WORKSPACE
    return device(kind).workspace


def scratch(func: Any, kind: str) -> Callable[[tuple, Any], int] | None:
    """What tells the bytes that the operator takes inside itself on this device type."""
    return device(kind).scratch.get(func.overloadpacket)


@contextlib.contextmanager
def kernels_of(kind: str) -> Iterator[None]:
    """Fake tensors of the CPU run the kernels of `kind`; real tensors run as ever."""
    composites = device(kind).composites
    if not composites:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, run in composites.items():
            library.impl(name, run, "AutogradCPU")
        yield
    finally:
        library._destroy()
