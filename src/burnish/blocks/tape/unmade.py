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

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from .chunked import Head
from .functions import once_differentiable
from .notes import Seen


def each_name(names: str) -> Iterator[Any]:
    for name in names.split():
        for home in (torch, Tensor):
            if (f := getattr(home, name, None)) is not None:
                yield f


#: function of torch -> what unmade logits answer to it, or NotImplemented (forms.py)
FOLLOWED: dict[Any, Callable[..., Any]] = {}

#: those whose arguments may change places
EITHER = frozenset(each_name("add __add__ __radd__ mul multiply __mul__ __rmul__"))

#: what shape and kind answer, without a number of it
FACTS = frozenset(
    getattr(Tensor, n).__get__ for n in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda",
        "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "nbytes",
        "itemsize")) | frozenset(each_name(
            "size dim ndimension numel nelement is_floating_point is_complex is_contiguous "
            "element_size get_device __len__ is_inference"))


def takes(follow: Callable[..., Any], args: tuple, kwargs: dict) -> bool:
    """Is there no argument that it knows nothing of?"""
    try:
        inspect.signature(follow).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class Step(NamedTuple):
    """What is done to each number of a row: ``apply(z)``.

    dtype: of the result.  reads: tensors among its arguments that train.  keeps: its backward reads
    its own result.  widens: it only writes the numbers wider, as the loss does anyway."""

    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    reads: tuple[Tensor, ...] = ()
    keeps: bool = False
    widens: bool = False


@dataclass(eq=False)
class Source:
    """One run of a head, to come.

    whole: gives all of it.  seen: what it reads, as it was.  used: told when a loss has taken it
    by chunks.  family: every form of the result that is alive.  stale: an optimizer has stepped
    what it reads (a fused step leaves no mark on a tensor).
    """

    head: Head
    chunk: int
    whole: Callable[[], Tensor] | None
    seen: Seen
    used: Callable[[], None]
    family: list[weakref.ref[Logits]]
    stale: bool = False

    def wait(self) -> None:
        """Hear of the steps of optimizers."""
        if self.head.reads:
            _waiting.add(self)

    def check(self) -> None:
        """RuntimeError when the head, or its input, is not what it was when the model ran."""
        if self.stale or not self.seen.intact:
            raise RuntimeError(
                "these logits have not been made yet, and their head or its input has changed "
                "since the forward (by an update?): read them before that, run the forward again, "
                "or have them whole with chunked_loss(on=False)")


#: those whose head trains
_waiting: weakref.WeakSet[Source] = weakref.WeakSet()


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Some optimizer has made a step."""
    waiting = list(_waiting)
    moved = {id(p) for g in optimizer.param_groups for p in g["params"]} if waiting else ()
    for source in waiting:
        source.stale |= any(id(t) in moved for t in source.head.reads)


register_optimizer_step_post_hook(_stepped)


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


def new(form: Form, x: Tensor, dtype: torch.dtype, width: int) -> Logits:
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
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Logits(Tensor):
    """(..., V) logits that are made when somebody reads them. Made by ``forms.logits``."""

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
        given = args
        if func in EITHER and len(args) == 2 and not isinstance(args[0], Logits):
            given = (args[1], args[0])               # a bias + logits
        first = given[0] if given else kwargs.get("input")
        if isinstance(first, Logits) and first.dense is None:
            if func in FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            follow = FOLLOWED.get(func)
            if follow is not None and first.own and takes(follow, given, kwargs):
                found = follow(*given, **kwargs)
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
