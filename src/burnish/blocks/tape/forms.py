"""What unmade logits (unmade.py) answer: forms that need none of them, losses that take chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked
from .chunked import Head
from .notes import Seen
from .unmade import FOLLOWED, Form, Logits, Source, Step, each_name, new


def logits(x: Tensor, head: Head, width: int, *, chunk: int = chunked.CHUNK,
           held: Sequence[Tensor] = (), used: Callable[[], None] = lambda: None) -> Logits:
    """What ``head.run`` would make of x (..., in): (..., width).

    held: what the head reads; once it has changed, logits that are not made yet raise.
    used: called when a loss takes them by chunks.
    """
    source = Source(head, chunk, lambda: head.run(x), Seen([x, *held]), used, [])
    source.wait()
    form = Form(source, None, _same, (), torch.is_grad_enabled())
    return new(form, x, head.dtype or x.dtype, width)


def _same(t: Tensor) -> Tensor:
    return t


# -- forms that need no logits --------------------------------------------------------------------
def _rows(z: Logits, change: Callable[[Tensor], Tensor], x: Tensor) -> Logits:
    """Other rows: x is the hidden state of these."""
    form = Form(z.form.source, z, change, z.form.steps, z.form.grad and torch.is_grad_enabled())
    return new(form, x, z.dtype, z.shape[-1])


def _each(z: Logits, step: Step) -> Logits:
    """Something done to each number."""
    steps = (*z.form.steps, step)
    form = Form(z.form.source, z, step.apply, steps, z.form.grad and torch.is_grad_enabled())
    return new(form, z.x, step.dtype, z.shape[-1])


def _view(z: Logits, *size: Any) -> Any:
    shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    if not all(isinstance(n, int) for n in shape):
        return NotImplemented
    *lead, last = shape
    width = z.shape[-1]
    if last != width and (last != -1 or math.prod(lead) * width != z.numel()):
        return NotImplemented
    return _rows(z, lambda t: t.reshape(*lead, width), z.x.reshape(*lead, z.x.shape[-1]))


def _flatten(z: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % z.dim() == z.dim() - 1:
        return NotImplemented
    return _rows(z, lambda t: t.flatten(start_dim, end_dim), z.x.flatten(start_dim, end_dim))


def _getitem(z: Logits, index: Any) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(p is Ellipsis or p is None or isinstance(p, int | slice | Tensor) for p in parts):
        return NotImplemented
    takes = sum(_takes(p) for p in parts)
    dots = [i for i, p in enumerate(parts) if p is Ellipsis]
    for at in dots[:1]:
        parts[at:at + 1] = [slice(None)] * (z.dim() - takes)
        takes = z.dim()
    if len(dots) > 1 or takes > z.dim():
        return NotImplemented                        # torch says what is wrong with it
    if takes == z.dim() and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented                        # some words
    where = tuple(parts)
    return _rows(z, lambda t: t[where], z.x[where])


def _takes(part: Any) -> int:
    """How many axes an entry of an index stands for."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _unbind(z: Logits, dim: int = 0) -> Any:
    if dim != 0 or z.dim() < 2:
        return NotImplemented
    return tuple(_getitem(z, i) for i in range(z.shape[0]))


def _detach(z: Logits) -> Logits:
    with torch.no_grad():
        return _rows(z, Tensor.detach, z.x.detach())


def _contiguous(z: Logits) -> Logits:
    return z


def _cast(z: Logits, dtype: torch.dtype) -> Any:
    if dtype == z.dtype:
        return z
    if not dtype.is_floating_point:
        return NotImplemented
    widens = dtype == torch.float32 and z.dtype in (torch.float16, torch.bfloat16)
    return _each(z, Step(lambda t: t.to(dtype), dtype, widens=widens))


def _to(z: Logits, *args: Any, **kw: Any) -> Any:
    if kw.pop("copy", False) or len(args) == 1 and isinstance(args[0], Tensor):
        return NotImplemented
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kw)
    if layout is not None or device is not None and device != z.device:
        return NotImplemented
    return z if dtype is None else _cast(z, dtype)


def _casts(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda z: _cast(z, dtype)


def _number(v: Any) -> bool:
    return isinstance(v, int | float) or \
        isinstance(v, Tensor) and not v.dim() and not v.requires_grad and v.is_floating_point()


def _mul(z: Logits, other: Any) -> Any:
    return _each(z, Step(lambda t: t * other, z.dtype)) if _number(other) else NotImplemented


def _div(z: Logits, other: Any) -> Any:
    return _each(z, Step(lambda t: t / other, z.dtype)) if _number(other) else NotImplemented


def _tanh(z: Logits) -> Logits:
    return _each(z, Step(torch.tanh, z.dtype, keeps=True))


def _add(z: Logits, other: Any) -> Any:
    """A bias: one number for each word."""
    width = z.shape[-1]
    if not isinstance(other, Tensor) or isinstance(other, Logits) or not other.dim() or \
            other.shape[-1] != width or other.numel() != width or other.dim() > z.dim() or \
            not other.is_floating_point():
        return NotImplemented
    bias, dtype = other.reshape(width), torch.promote_types(z.dtype, other.dtype)
    return _each(z, Step(lambda t: t + bias, dtype, (bias,) if bias.requires_grad else ()))


# -- readers that take a chunk at a time ----------------------------------------------------------
def _cross_entropy(input: Logits, target: Any, weight: Tensor | None = None,
                   size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
                   reduction: str = "mean", label_smoothing: float = 0.0) -> Any:
    shape = input.shape
    if input.dim() != 2 or not shape[0] or size_average is not None or reduce is not None \
            or not isinstance(target, Tensor) or target.requires_grad \
            or reduction not in ("mean", "sum", "none") or weight is not None \
            and (weight.requires_grad or weight.shape != shape[1:]) \
            or target.shape != (shape if target.is_floating_point() else shape[:1]):
        return NotImplemented                        # torch can do it, or says why it cannot
    source = input.form.source
    source.check()
    source.used()
    return chunked.cross_entropy(
        input.x, input.form.head, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, chunk=source.chunk, dtype=input.dtype)


def _logsumexp(input: Logits, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if dim not in (-1, input.dim() - 1) or keepdim:
        return NotImplemented
    input.form.source.check()
    x = input.x
    made = chunked.logsumexp(x.reshape(-1, x.shape[-1]), input.form.head,
                             chunk=input.form.source.chunk, dtype=input.dtype)
    return made.view(input.shape[:-1])


def _argmax(input: Logits, dim: Any = None, keepdim: bool = False) -> Any:
    if dim not in (-1, input.dim() - 1) or keepdim or not input.x.numel():
        return NotImplemented
    input.form.source.check()
    x = input.x.detach()
    made = chunked.argmax(x.reshape(-1, x.shape[-1]), input.form.head,
                          chunk=input.form.source.chunk)
    return made.view(input.shape[:-1])


FOLLOWED.update({
    f: follow for names, follow in (
        ("view reshape", _view), ("flatten", _flatten), ("__getitem__", _getitem),
        ("unbind", _unbind), ("detach", _detach),
        ("contiguous", _contiguous), ("to", _to), ("float", _casts(torch.float32)),
        ("double", _casts(torch.float64)), ("half", _casts(torch.float16)),
        ("bfloat16", _casts(torch.bfloat16)), ("mul multiply __mul__ __rmul__", _mul),
        ("div divide true_divide __truediv__", _div), ("tanh", _tanh),
        ("add __add__ __radd__", _add),
        ("logsumexp", _logsumexp), ("argmax", _argmax)) for f in each_name(names)})
FOLLOWED[F.cross_entropy] = _cross_entropy
for _name in ("float", "double", "half", "bfloat16"):    # of torch they are dtypes
    FOLLOWED.pop(getattr(torch, _name), None)
