"""Activations between two linears: the widest tensors of a transformer, and two of them less.

*The gradient.* Stock backward makes dx = f'(x) g beside g. Where g is a product that was made for
this one node, its memory can be dx. Whether anybody else has it (another branch of the graph, a
hook that keeps it, the person who gave it to ``backward``) is asked of its counts of references; in
doubt dx is a tensor of its own, as in stock torch.

*The output.* The lean tape makes it again for the linear behind. Where that linear needs it only
for a sum over tokens (``dA = h^T f(x)`` of a factor chain), it is made strip by strip of tokens, in
one small buffer, and never stands whole (:class:`Strips`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .functions import transformed
from .notes import Kept, Note

_aten = torch.ops.aten
#: elements of one strip: on a CPU what stays in its cache, elsewhere what is worth a launch
STRIP = {"cpu": 1 << 21}
LONG_STRIP = 1 << 24


def strip(kind: str) -> int:
    """Elements of a strip on a kind of device."""
    return STRIP.get(kind, LONG_STRIP)


class _Known(NamedTuple):
    """An elementwise function by its operators. forth(x, **kwargs, out=y); back(g, x, **kwargs),
    which takes ``grad_input=dx`` where memory is given."""

    forth: Callable[..., Tensor]
    back: Callable[..., Tensor]


def _relu_backward(g: Tensor, x: Tensor, **into: Tensor) -> Tensor:
    return _aten.threshold_backward(g, x, 0, **into)


KNOWN: dict[Any, _Known] = {F.gelu: _Known(_aten.gelu, _aten.gelu_backward),
                            F.silu: _Known(_aten.silu, _aten.silu_backward),
                            F.relu: _Known(_aten.relu, _relu_backward)}


def run(func: Any, args: tuple, kwargs: dict) -> Tensor:
    """``func(*args, **kwargs)`` for one that is :data:`KNOWN`: the same numbers, forth and back."""
    if _MINE is None or len(args) != 1 or transformed():
        return func(*args, **kwargs)
    return _Elementwise.apply(args[0], func, _asked(kwargs))


def _asked(kwargs: dict) -> dict:
    """The keywords that operators know (none of these calls is in place)."""
    return {k: v for k, v in kwargs.items() if k != "inplace"}


class _Elementwise(torch.autograd.Function):
    """``func(x, **kwargs)``, which keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, func: Any, kwargs: dict) -> Tensor:
        ctx.func, ctx.kwargs = func, kwargs
        ctx.save_for_backward(x)
        return func(x, **kwargs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        mine = _counts(g) == _MINE               # first of all: another name for g would count
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():              # it will be differentiated again
            y = ctx.func(x, **ctx.kwargs)
            return torch.autograd.grad(y, x, g, create_graph=True)[0], None, None
        mine = mine and g.stride() == x.stride() and g.dtype is x.dtype
        into = {"grad_input": g} if mine else {}
        return KNOWN[ctx.func].back(g, x, **ctx.kwargs, **into), None, None


def _counts(g: Tensor) -> tuple[int, int, int]:
    """References to a tensor: of the engine, to its memory, of Python."""
    return (g._use_count(), torch._C._storage_Use_Count(g.untyped_storage()._cdata),
            sys.getrefcount(g))


def _alone() -> tuple[int, int, int] | None:
    """The counts of a gradient that nobody else has; None where torch does not tell them."""
    if not hasattr(Tensor, "_use_count"):
        return None
    seen = []

    class Looking(_Elementwise):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
            counts = _counts(g)
            seen.append(counts)
            return g, None, None

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(2, device="cpu", requires_grad=True)
        (Looking.apply(x, F.gelu, {}) * x).sum().backward()
    return seen[0]


_MINE = _alone()


class Strips:
    """What an activation gave, (tokens, width), made again some tokens at a time.

    Iterating gives ``(n0, n1, rows n0:n1)``; the rows are in a buffer that the next ones overwrite.
    """

    def __init__(self, x: Tensor, func: Any, kwargs: dict, tokens: int):
        self.x, self.func, self.kwargs, self.tokens = x, func, _asked(kwargs), tokens
        self.shape = x.shape

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        buffer = self.x.new_empty(self.tokens, self.shape[1])
        for n0 in range(0, self.shape[0], self.tokens):
            n1 = min(self.shape[0], n0 + self.tokens)
            rows = buffer[:n1 - n0]
            KNOWN[self.func].forth(self.x[n0:n1], **self.kwargs, out=rows)
            yield n0, n1, rows


def strips(kept: Any) -> Strips | None:
    """`kept` (what the tape has put in a tensor's place) strip by strip, where it is the output of
    an activation, of more than one strip, that nobody else is waiting for."""
    if type(kept) is not Note or kept.view is not None:
        return None
    entry = kept.entry
    if entry.fn not in KNOWN or entry.left != 1 or entry.value is not None \
            or len(entry.args) != 1 or (shape := _shape(entry.args[0])) != entry.shape[:3]:
        return None
    _, size, stride = shape
    tokens = strip(entry.autocast[0]) // size[-1] if size and size[-1] else 0
    if not 0 < tokens < size.numel() // size[-1] or not _in_order(size, stride):
        return None
    x = entry.args[0].open().detach()
    return Strips(x.view(-1, size[-1]), entry.fn, entry.kwargs, tokens)


def _shape(kept: Any) -> Any:
    """(dtype, sizes, strides) of what was kept, where that can be told without opening it."""
    if type(kept) is Note:
        return kept.entry.shape[:3] if kept.view is None else None
    return (kept.tensor.dtype, kept.tensor.size(), kept.tensor.stride()) if type(kept) is Kept \
        else None


def _in_order(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Do numbers of these sizes and strides lie one after the other?"""
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True
