"""The input of a layer as autocast wants it, made once for all layers that read it.

Stock autocast casts an activation anew for each of its readers and each keeps its copy: of q, k
and v three. Here the readers share one; every reader's gradient is still cast back by itself, so
they are summed in the precision of the activation, as in stock torch.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...core.call import current
from .functions import transformed, version_of

_KEY = "the last cast"


def casting(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives tensors where x is; None: it is off, or knows no such device
    (meta)."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def uncast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, operations where x is keep their tensors' own precision."""
    return nullcontext() if casting(x) is None else torch.autocast(x.device.type, enabled=False)


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype of the autocast that is on here, or as it is."""
    dtype = casting(x)
    if dtype is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    call = current()
    if x.dtype == dtype or call is None or transformed():
        return x.to(dtype)
    return _Cast.apply(x, _made(call.box, x, dtype))


def _made(box: dict[Any, Any], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of `x`. Only the last one waits, and no longer than `x` itself."""
    last = box.get(_KEY)
    if last is not None and last.of() is x and last.intact(x, dtype):
        return last.made
    last = box[_KEY] = _Last(box, x, dtype)
    return last.made


class _Last:
    def __init__(self, box: dict[Any, Any], x: Tensor, dtype: torch.dtype):
        self.made = x.detach().to(dtype)
        self.versions = version_of(x), version_of(self.made)
        # told only while this is the last cast: the reference goes with it
        self.of = weakref.ref(x, lambda _: box.pop(_KEY, None))

    def intact(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.made.dtype == dtype and \
            self.versions == (version_of(x), version_of(self.made))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return made.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.dtype), None
