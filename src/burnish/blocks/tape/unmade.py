"""Logits that nobody has made yet: a tensor that knows its rows and its head.

A language model calls its head and hands the result to a loss, in a form of its own: shifted,
flattened, widened, scaled, soft-capped, with a bias on top. :class:`Logits` stands for that result
and follows these forms: what acts on the rows (slices, reshapes) is done to the hidden state, what
acts on each number (:class:`Step`) waits. ``F.cross_entropy``, ``logsumexp`` and ``argmax`` then
take a chunk of rows at a time (chunked.py). Whatever else reads it, and whatever writes to it, gets
the whole tensor, made as the model would have made it; from then on that tensor is what stands
here, for every form of it, so reading and writing mean what they mean on any tensor.

It is a node of autograd's graph: a function that takes it past Python's dispatch (another autograd
function) reads whole logits, and their gradient reaches the hidden state and the head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from . import chunked
from .chunked import Head
from .notes import Seen


class Step(NamedTuple):
    """What is done to each number of a row: ``apply(z)``.

    dtype: of the result.  reads: tensors among its arguments that train.  keeps: its backward reads
    its own result.  widens: it only writes the numbers wider, as the loss does anyway."""

    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    reads: tuple[Tensor, ...] = ()
    keeps: bool = False
    widens: bool = False


@dataclass
class Source:
    """One run of a head, to come.

    whole: gives all of it.  seen: what it reads, as it was.  used: told when a loss has taken it
    by chunks.  family: every form of the result that is alive.
    """

    head: Head
    chunk: int
    whole: Callable[[], Tensor] | None
    seen: Seen
    used: Callable[[], None]
    family: list[weakref.ref[Logits]]

    def check(self) -> None:
        """RuntimeError when the head, or its input, is not what it was when the model ran."""
        if not self.seen.intact:
            raise RuntimeError(
                "these logits have not been made yet, and their head or its input has changed "
                "since the forward (by an update?): read them before that, run the forward again, "
                "or have them whole with chunked_loss(on=False)")


@dataclass(frozen=True)
class Form:
    """A form of the logits: `change` of another one, or (None) the head's own result. steps: what
    waits on each number.  grad: was it made where graphs are made?"""

    source: Source
    parent: Logits | None
    change: Callable[[Tensor], Tensor]
    steps: tuple[Step, ...]
    grad: bool

    @property
    def head(self) -> Head:
        """Rows of this form's hidden state to rows of this form."""
        head, steps = self.source.head, self.steps
        if not self.grad:
            head = replace(head, reads=())
        if not steps:
            return head

        def run(x: Tensor) -> Tensor:
            y = head.run(x)
            for step in steps:
                y = step.apply(y)
            return y

        reads = {id(t): t for t in (*head.reads, *(r for s in steps for r in s.reads))}
        return replace(head, run=run, reads=tuple(reads.values()) if self.grad else (),
                       stock=head.stock if all(s.widens for s in steps) else lambda: None,
                       keeps=head.keeps or steps[-1].keeps)


def logits(x: Tensor, head: Head, width: int, *, chunk: int = chunked.CHUNK,
           held: Sequence[Tensor] = (), used: Callable[[], None] = lambda: None) -> Logits:
    """What ``head.run`` would make of x (..., in): (..., width).

    held: what the head reads; once it has changed, logits that are not made yet raise.
    used: called when a loss takes them by chunks.
    """
    source = Source(head, chunk, lambda: head.run(x), Seen([x, *held]), used, [])
    form = Form(source, None, _same, (), torch.is_grad_enabled())
    return _new(form, x, head.dtype or x.dtype, width)


def _same(t: Tensor) -> Tensor:
    return t


def _new(form: Form, x: Tensor, dtype: torch.dtype, width: int) -> Logits:
    made = _Node.apply(form, x, dtype, width, *form.head.reads)
    form.source.family.append(weakref.ref(made))
    return made


class _Node(torch.autograd.Function):
    """The place of unmade logits in the graph, for readers that Python does not see."""

    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, dtype: torch.dtype, width: int,
                *reads: Tensor) -> Tensor:
        ctx.form, ctx.read = form, (x, *reads)
        made = Logits((*x.shape[:-1], width), dtype, x.device)
        made.form, made.x, made.dense = form, x, None
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        ctx.form.source.check()
        wanted = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        x, *reads = ctx.read
        x = x.detach().requires_grad_(wanted[0])
        with torch.enable_grad():
            y = ctx.form.head.run(x)
        some = [t for t, w in zip((x, *reads), wanted, strict=True) if w]
        found = iter(torch.autograd.grad([y], some, [g], allow_unused=True))
        dx, *grads = [next(found) if w else None for w in wanted]
        return None, dx, None, None, *grads


class _Opened(torch.autograd.Function):
    """The values of logits that somebody's autograd function has handed on as its own result."""

    @staticmethod
    def forward(ctx: Any, t: Logits) -> Tensor:
        return t.values_now()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Logits(Tensor):
    """(..., V) logits that are made when somebody reads them. Made by :func:`logits`."""

    form: Form
    x: Tensor | None                                 # (..., in): its rows, until it is made
    dense: Tensor | None                             # the tensor itself, once it is made

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Logits:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Logits) and first.dense is None:
            if func in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            follow = _FOLLOWED.get(func)
            if follow is not None and first.own:
                found = follow(*args, **kwargs)
                if found is not NotImplemented:
                    return found
        args, kwargs = pytree.tree_map_only(Logits, Logits.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        # below autograd: what is made here has no graph, so nobody may find it later
        args, kwargs = pytree.tree_map_only(Logits, Logits.values_now, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def own(self) -> bool:
        """Is its place in the graph its own? An autograd function that returns it takes it over."""
        with torch._C.DisableTorchFunctionSubclass():
            node = self.grad_fn
        return node is None or getattr(node, "form", None) is self.form

    def whole(self) -> Tensor:
        """The tensor itself. With it every other form of these logits that is alive is made: what
        is written to one of them may be seen in another."""
        if not self.own:
            return _Opened.apply(self)
        source = self.form.source
        family, source.family = source.family, []
        for ref in family:
            if (other := ref()) is not None:
                other._make()
        source.whole, source.seen = None, Seen()     # what they hold is not needed any more
        return self._make()

    def _make(self) -> Tensor:
        if self.dense is None:
            form = self.form
            base = None if form.parent is None else form.parent._make()
            with torch.set_grad_enabled(form.grad):
                if base is None:
                    form.source.check()
                    base = form.source.whole()       # type: ignore[misc]
                self.dense, self.x = form.change(base), None
        return self.dense

    def values_now(self) -> Tensor:
        """Its values, made for this once, without a graph."""
        with torch.no_grad():
            if self.dense is not None:
                return self.dense.detach()
            self.form.source.check()
            return self.form.head.run(self.x.detach())       # type: ignore[union-attr]


# -- forms that need no logits --------------------------------------------------------------------
def _rows(z: Logits, change: Callable[[Tensor], Tensor], x: Tensor) -> Logits:
    """Other rows: x is the hidden state of these."""
    form = Form(z.form.source, z, change, z.form.steps, z.form.grad and torch.is_grad_enabled())
    return _new(form, x, z.dtype, z.shape[-1])


def _each(z: Logits, step: Step) -> Logits:
    """Something done to each number."""
    steps = (*z.form.steps, step)
    form = Form(z.form.source, z, step.apply, steps, z.form.grad and torch.is_grad_enabled())
    return _new(form, z.x, step.dtype, z.shape[-1])


def _view(z: Logits, *size: Any) -> Any:
    shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    width = z.shape[-1]
    if not shape or not all(isinstance(n, int) for n in shape) or shape[-1] not in (width, -1) \
            or width == 1:
        return NotImplemented
    lead = list(shape[:-1])
    rows = z.numel() // width
    known = 1
    for n in lead:
        known *= 1 if n == -1 else n
    if shape[-1] == -1 and (lead.count(-1) or known != rows) or not known or rows % known:
        return NotImplemented                        # torch says what is wrong with it
    if -1 not in lead and known != rows:
        return NotImplemented
    return _rows(z, lambda t: t.reshape(*lead, width), z.x.reshape(*lead, z.x.shape[-1]))


def _flatten(z: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not -z.dim() <= end_dim % z.dim() < z.dim() - 1:
        return NotImplemented
    return _rows(z, lambda t: t.flatten(start_dim, end_dim), z.x.flatten(start_dim, end_dim))


def _getitem(z: Logits, index: Any) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(p is Ellipsis or p is None or isinstance(p, int | slice) or isinstance(p, Tensor)
               and not isinstance(p, Logits) for p in parts):
        return NotImplemented
    takes = [p.dim() if isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8)
             else 0 if p is None or p is Ellipsis else 1 for p in parts]
    dots = [i for i, p in enumerate(parts) if p is Ellipsis]
    if dots:
        at = dots[0]
        parts[at:at + 1] = [slice(None)] * (z.dim() - sum(takes))
    if len(dots) > 1 or bool(dots) and sum(takes) > z.dim():
        return NotImplemented
    if dots or sum(takes) == z.dim():
        if not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            return NotImplemented
        parts.pop()
    elif sum(takes) > z.dim():
        return NotImplemented
    where = tuple(parts)
    return _rows(z, lambda t: t[where], z.x[where])


def _unbind(z: Logits, dim: int = 0) -> Any:
    if dim != 0 or z.dim() < 2:
        return NotImplemented
    return tuple(_getitem(z, i) for i in range(z.shape[0]))


def _iterate(z: Logits) -> Any:
    found = _unbind(z)
    return found if found is NotImplemented else iter(found)


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


def _each_name(names: str) -> Iterator[Any]:
    for name in names.split():
        for home in (torch, Tensor):
            if (f := getattr(home, name, None)) is not None:
                yield f


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    f: follow for names, follow in (
        ("view reshape", _view), ("flatten", _flatten), ("__getitem__", _getitem),
        ("unbind", _unbind), ("__iter__", _iterate), ("detach", _detach),
        ("contiguous", _contiguous), ("to", _to), ("float", _casts(torch.float32)),
        ("double", _casts(torch.float64)), ("half", _casts(torch.float16)),
        ("bfloat16", _casts(torch.bfloat16)), ("mul multiply __mul__ __rmul__", _mul),
        ("div divide true_divide __truediv__", _div), ("tanh", _tanh),
        ("add __add__ __radd__", _add),
        ("logsumexp", _logsumexp), ("argmax", _argmax)) for f in _each_name(names)}
_FOLLOWED[F.cross_entropy] = _cross_entropy
for _name in ("float", "double", "half", "bfloat16"):    # of torch they are dtypes
    _FOLLOWED.pop(getattr(torch, _name), None)

#: what shape and kind answer, without a number of it
_FACTS = frozenset(
    getattr(Tensor, n).__get__ for n in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda",
        "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "nbytes",
        "itemsize")) | frozenset(_each_name(
            "size dim ndimension numel nelement is_floating_point is_complex is_contiguous "
            "element_size get_device __len__ is_inference"))
