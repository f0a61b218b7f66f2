"""A model without its weights: fake parameters of the same shapes, on any device.

A copy shares no storage with the model it was made from and reads none of it. A config becomes a
model on `meta` first (initialisers ask for values, which only a real or a meta tensor survives)
and is then given fake parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..core import unread
from ..core.architecture import architecture
from ..core.example import example_batch
from ..core.extras import worded


@worded()
def from_config(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that the config stands for (core/architecture.py), on meta, in training mode."""
    from transformers import initialization

    cls = architecture(config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), safe():
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    return model.train()


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: str | torch.device,
              dtype: torch.dtype | None = None, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of `model` whose tensors are fake, on `device`, in `dtype` where floating.

    memo: of the copy, for copying what holds the model with it."""
    memo = {} if memo is None else memo
    keep: list[Tensor] = []                   # ids stay valid while the copy is made
    with mode:
        for _, t in _tensors(model):
            if id(t) in memo:
                continue
            keep.append(t)
            kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
            one = 0 in t.stride() and t.numel() > 1       # it stands for values still in a file
            fake = torch.empty(t.shape, dtype=kind, device=device) if one else \
                torch.empty_strided(t.shape, t.stride(), dtype=kind, device=device)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=t.requires_grad)
            memo[id(t)] = fake
    twin = copy.deepcopy(model, memo)
    del keep
    return twin


class Waiting:
    """The file of a fake parameter: memory comes of it and no values do."""

    def __init__(self, like: Tensor):
        self.shape, self.dtype = like.shape, like.dtype

    def read(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def unread_again(twin: nn.Module) -> None:
    """Let the weights of a fake model wait in files, as those of the model it was made from."""
    for p in twin.parameters():
        if p.nbytes >= unread.WAITS:
            unread.mark(p, Waiting(p))
            p.data = unread.blank(p.shape, p.dtype, p.device)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    for path, module in model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                yield f"{path}.{name}" if path else name, t
        for name, t in vars(module).items():
            if isinstance(t, Tensor):
                yield f"{path}.{name}" if path else name, t


def blank_batch(model: nn.Module, batch: int | tuple[int, int], dtype: torch.dtype | None
                ) -> dict[str, Any]:
    """What the model takes for `batch` samples: floats on meta, integers real and all ones."""
    with torch.device("meta"):
        made = example_batch(model, batch)
    return {k: _blank(v, dtype) if isinstance(v, Tensor) else v for k, v in made.items()}


def _blank(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    if t.is_floating_point():
        return t if dtype is None else t.to(dtype)
    return torch.ones(t.shape, dtype=t.dtype)


@contextlib.contextmanager
def fakes_move() -> Iterator[None]:
    """Let ``module.to(...)`` work on fake parameters: torch swaps them in place, which fails while
    anything holds a weak reference to them; here they are replaced, and left alone where the
    conversion changes nothing."""
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        if not any(isinstance(p, FakeTensor) for p in self._parameters.values()):
            return original(self, fn, recurse)
        if recurse:
            for child in self.children():
                child._apply(fn)
        for name, p in self._parameters.items():
            if p is None:
                continue
            with torch.no_grad():
                new = fn(p)
            if new is not p:
                moved = nn.Parameter(new, requires_grad=p.requires_grad)
                moved.__dict__.update(p.__dict__)
                self._parameters[name] = moved
        for name, b in self._buffers.items():
            self._buffers[name] = b if b is None else fn(b)
        return self

    nn.Module._apply = apply                  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original           # type: ignore[method-assign]


# -- operators whose fake version differs from the kernels --------------------------------------
def _layer_norm_backward(g: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor,
                         weight: Tensor | None, bias: Tensor | None, mask: Any) -> Any:
    """The kernels write dx contiguous; the decomposition that fake tensors run follows g."""
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device) if mask[0] else None,
            torch.empty_like(weight) if mask[1] and weight is not None else None,
            torch.empty_like(bias) if mask[2] and bias is not None else None)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
                out_dtype: torch.dtype | None = None) -> Tensor:
    """The fake version takes bf16 only, the CPU takes every dtype. Rows are padded to 16 bytes."""
    shape: tuple[int, ...]
    if a.dim() == 2 and b.dim() == 2:
        shape = (offs.shape[0], a.shape[0], b.shape[1])       # type: ignore[union-attr]
    elif a.dim() == 3 and b.dim() == 3:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])
    dtype = out_dtype or a.dtype
    step = 16 // dtype.itemsize
    row = -(-shape[-1] // step) * step
    strides = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device=a.device)


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    """Asked for the bias gradient, the CPU makes the weight's too, whether it is wanted or not."""
    *rest, mask = args
    mask = [mask[0], mask[1] or mask[2], mask[2]]
    return torch.ops.aten.convolution_backward.default(g, x, weight, *rest, mask)


def _batch_norm(x: Tensor, *args: Any) -> Any:
    """The CPU writes rows, or channels last where the input lies so; the fake version follows any
    strides."""
    _, *rest = torch.ops.aten.native_batch_norm.default(x, *args)
    return (torch.empty_like(x, memory_format=suggest_memory_format(x)), *rest)


def _batch_norm_backward(g: Tensor, x: Tensor, *args: Any) -> Any:
    """As the CPU's forward does."""
    dx, *rest = torch.ops.aten.native_batch_norm_backward.default(g, x, *args)
    return (None if dx is None else
            torch.empty_like(x, memory_format=suggest_memory_format(x)), *rest)


def _ctc_loss(log_probs: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int = 0,
              zero_infinity: bool = False) -> tuple[Tensor, Tensor]:
    """The sizes depend on the longest target: the width of rows padded to it."""
    if targets.dim() != 2:
        return torch.ops.aten._ctc_loss.Tensor(log_probs, targets, frames, lengths, blank,
                                               zero_infinity)
    many = log_probs.shape[1] if log_probs.dim() == 3 else 1
    return (log_probs.new_empty(many),
            log_probs.new_empty(many, log_probs.shape[0], 2 * targets.shape[1] + 1))


def _ctc_loss_backward(grad: Tensor, log_probs: Tensor, *args: Any, **kw: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _reduced(op: Any) -> Any:
    """A loss that the kernels write element by element and then reduce in place: the scalar keeps
    the memory of them all."""
    def loss(x: Tensor, target: Tensor, *args: Any, **kw: Any) -> Tensor:
        made: Tensor = op(x, target, *args, **kw)
        if made.dim() or not x.dim():
            return made
        shape = torch.broadcast_shapes(x.shape, target.shape)
        return made.new_empty(shape).as_strided((), ())
    return loss


KERNELS: dict[Any, Any] = {
    **{op: _reduced(op) for op in (
        torch.ops.aten.mse_loss.default, torch.ops.aten.smooth_l1_loss.default,
        torch.ops.aten.binary_cross_entropy.default, torch.ops.aten.soft_margin_loss.default)},
    torch.ops.aten._ctc_loss.Tensor: _ctc_loss,
    torch.ops.aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    torch.ops.aten.native_layer_norm_backward.default: _layer_norm_backward,
}
if hasattr(torch.ops.aten, "_grouped_mm"):
    KERNELS[torch.ops.aten._grouped_mm.default] = _grouped_mm


def kernels(kind: str) -> dict[Any, Any]:
    """What stands for an operator's fake version, on tensors of this device type."""
    if kind != "cpu":
        return KERNELS
    return {**KERNELS, torch.ops.aten.convolution_backward.default: _convolution_backward,
            torch.ops.aten.native_batch_norm.default: _batch_norm,
            torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward}
