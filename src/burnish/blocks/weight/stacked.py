"""Weights of experts of which one is made at a time: a tensor that stands for all of them.

A mixture of experts holds its matrices in one parameter (experts, a, b) and multiplies tokens that
are sorted by expert (``grouped_mm``, ``bmm``), or takes one matrix after another. Where the
parameter is held in another form, or updates are added to it, a :class:`Stack` stands for it:

    y_n = W_e x_n + sum of s Delta_e x_n,     e the expert that token n was sent to

and its products decode one expert's matrix after another, of those alone that received tokens, in
forward and once more in backward; nothing of a matrix's size is kept. Views that only choose an
expert or turn its matrix are followed; whatever else reads a stack gets the whole tensor, which
backward makes again.

Letters: S rows of tokens, E experts, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ...core.call import current, resume
from ...core.followed import simulated
from ...core.site import Place
from ..tape import cast
from ..tape.functions import applied, as_required, once_differentiable
from ..tape.notes import Seen
from ..tape.roles import reading
from ..tape.saved import Tape
from ..tape.unmade import FACTS, each_name, takes
from .backward import as_then, uncast
from .term import Run, Term


@dataclass(eq=False)
class Source:
    """What a stack stands for.

    place: of the parameter, (E, O, I) or its transpose.
    like: a tensor of one entry with its precision and device.
    matrix: expert -> what the parameter stores of it, (a, b), possibly a temporary.
    make: the whole tensor, updates and all, differentiable.
    held: gives the tensors that `matrix` reads.
    terms: updates that are added, each with its weight; all of them say `by_expert`.
    tape: on which the whole tensor, and products, are noted.
    """

    place: Place
    like: Tensor
    matrix: Callable[[int], Tensor]
    make: Callable[[], Tensor]
    held: Callable[[], Sequence[Tensor]]
    terms: Sequence[tuple[Term, float]]
    tape: Tape

    def theta(self) -> list[Tensor]:
        return [p for t, _ in self.terms for p in t.theta()]

    def reads(self) -> list[Tensor]:
        return [*(r for t, _ in self.terms for r in t.reads(True)), *self.held()]

    def weight(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix (O, I) without its updates."""
        return self.place.view(self.matrix(expert)).to(dtype)


class Form(NamedTuple):
    """One way to look at it. expert: that matrix alone; turned: its axes have changed places."""

    source: Source
    expert: int | None = None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        p = self.source.place
        last = (p.out, p.inp) if p.transposed is self.turned else (p.inp, p.out)
        return last if self.expert is not None else (p.experts, *last)

    def of(self, whole: Tensor) -> Tensor:
        """The same of a whole tensor."""
        one = whole if self.expert is None else whole[self.expert]
        return one.transpose(-2, -1) if self.turned else one

    def values(self) -> Tensor:
        """The tensor itself, by as little as can be made of it."""
        if self.expert is None or self.source.terms:
            return self.of(self.source.make())
        one = self.source.matrix(self.expert)
        return one.transpose(-2, -1) if self.turned else one


def stack(source: Source) -> Stack:
    """A tensor that stands for the parameter."""
    return _new(Form(source))


def _new(form: Form) -> Stack:
    theta = form.source.theta()
    if torch.is_grad_enabled() and any(t.requires_grad for t in theta):
        made: Stack = applied(_Node, form, *theta)
        return made
    return Stack(form)


class Stack(Tensor):
    """(E, a, b) weights, or (a, b) of one expert, made where somebody reads them."""

    form: Form

    @staticmethod
    def __new__(cls, form: Form) -> Stack:
        like = form.source.like
        made = Tensor._make_wrapper_subclass(cls, form.shape, dtype=like.dtype, device=like.device)
        made.form = form
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        follow = _FOLLOWED.get(func) or _FOLLOWED.get(str(func))
        if follow is not None and takes(follow, args, kwargs):
            found = follow(*args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = pytree.tree_map_only(Stack, Stack.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        # below autograd: a function of somebody's own reads it; its gradient comes to the node
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(Stack, lambda t: t.form.values().detach(),
                                                (args, kwargs or {}))
        return func(*args, **kwargs)

    def whole(self) -> Tensor:
        """The tensor itself; backward makes it again instead of keeping it."""
        form, call = self.form, current()
        value = form.values()
        if torch.is_grad_enabled():
            def again() -> Tensor:
                with resume(call):
                    return form.values()

            form.source.tape.note(value, again, (), {}, form.source.reads())
        return value


class _Node(torch.autograd.Function):
    """The place of a stack in the graph, for readers that Python does not see."""

    @staticmethod
    def forward(ctx: Any, form: Form, *theta: Tensor) -> Tensor:
        ctx.form, ctx.theta, ctx.call = form, theta, current()
        ctx.seen = Seen(form.source.reads())
        return Stack(form)

    @staticmethod
    @once_differentiable
    @as_then
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        ctx.seen.check(ctx.form.source.reads(), _named)
        with as_required(ctx.theta, needs), torch.enable_grad():
            made = ctx.form.values()
            wanted = [t for t, need in zip(ctx.theta, needs, strict=True) if need]
            got = iter(torch.autograd.grad(made, wanted, G, allow_unused=True))
        return None, *[next(got) if need else None for need in needs]


def _named(k: int) -> str:
    return "what holds or changes the weights of experts"


# -- products -------------------------------------------------------------------------------------
class _Products(torch.autograd.Function):
    """Runs of rows, each times its expert's matrix. x (S, I) to (S, O), where ``straight``; else by
    the transpose, (S, O) to (S, I). Rows of no run are zero."""

    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, source: Source, runs: list[Run], straight: bool,
                *theta: Tensor) -> Tensor:
        place = source.place
        y = _room(x, place.out if straight else place.inp, runs)
        for run in runs:
            _times(x, y, source, run, straight)
        kept = [t.forward_each(x, y, runs, s) for t, s in source.terms]
        ctx.source, ctx.runs, ctx.straight, ctx.call = source, runs, straight, current()
        ctx.seen = Seen(source.reads())
        ctx.width, flat = x.shape[1], list[Tensor | None]()
        ctx.kept = [[_put(v, flat) for v in own] for own in kept]
        keep_x = any(t.keeps_input for t, _ in source.terms)
        ctx.save_for_backward(x if keep_x else None, *flat)
        return y

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        source: Source = ctx.source
        x, *flat = ctx.saved_tensors
        kept = [tuple(flat[v.at] if isinstance(v, _At) else v for v in own) for own in ctx.kept]
        dx = _room(g, ctx.width, ctx.runs) if ctx.needs_input_grad[0] else None
        grads = list[Tensor | None]()
        with as_required(source.theta(), ctx.needs_input_grad[4:]):
            ctx.seen.check(source.reads(), _named)
            for run in ctx.runs if dx is not None else ():
                _times(g, dx, source, run, not ctx.straight)
            for (t, s), own in zip(source.terms, kept, strict=True):
                grads += t.backward_each(g, x, own, dx, ctx.runs, s)
        return dx, None, None, None, *grads


class _At(NamedTuple):
    """A tensor that autograd keeps, by its number."""

    at: int


def _put(value: Any, flat: list[Tensor | None]) -> Any:
    if not isinstance(value, Tensor):
        return value
    flat.append(value)
    return _At(len(flat) - 1)


def _room(x: Tensor, width: int, runs: list[Run]) -> Tensor:
    """A place for as many rows as x has; those that no run writes are zero."""
    out = x.new_empty(x.shape[0], width)
    end = 0
    for _, a, b in runs:
        out[end:a].zero_()
        end = b
    out[end:].zero_()
    return out


def _times(x: Tensor, y: Tensor, source: Source, run: Run, straight: bool) -> None:
    """One run's rows of y; the matrix is gone at the end."""
    expert, a, b = run
    W = source.weight(expert, x.dtype)
    torch.mm(x[a:b], W.t() if straight else W, out=y[a:b])


def _product(x: Tensor, W: Stack, runs: list[Run], turned: bool) -> Any:
    """Runs of rows of x (S, k), each times its matrix (k, n), or (n, k) where `turned`."""
    form = W.form
    source = form.source
    out_first = form.turned is source.place.transposed       # is it seen as (out, in)?
    straight = out_first is turned
    width = source.place.inp if straight else source.place.out
    if x.dim() != 2 or x.shape[1] != width or source.terms and not straight:
        return NotImplemented                    # (of a wrong shape torch says what is wrong)
    theta = source.theta()

    def made(x: Tensor) -> Tensor:
        with reading((x,)):
            y: Tensor = applied(_Products, x, source, runs, straight, *theta)
        return y

    y, tape, call = made(x), source.tape, current()
    if tape.notes_products:
        def again(x: Tensor) -> Tensor:
            with resume(call):
                return made(x)

        tape.note(y, again, (x,), {}, source.reads(), product=True)
    return y


def _one(x: Any, W: Any, turned: bool) -> Any:
    """x (..., k) times the matrix of one expert."""
    if not isinstance(W, Stack) or W.form.expert is None or isinstance(x, Stack):
        return NotImplemented
    x = cast.autocast(x)
    x2 = x.reshape(-1, x.shape[-1])
    y = _product(x2, W, [(W.form.expert, 0, len(x2))] if len(x2) else [], turned)
    return y if y is NotImplemented or x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    y = _one(input, weight, True)
    return y if bias is None or y is NotImplemented else y + bias.to(y.dtype)


def _matmul(input: Any, other: Any) -> Any:
    each = isinstance(other, Stack) and other.form.expert is None
    return _bmm(input, other) if each else _one(input, other, False)


def _bmm(input: Any, mat2: Any) -> Any:
    if not isinstance(mat2, Stack) or mat2.form.expert is not None or isinstance(input, Stack) \
            or input.dim() != 3 or len(input) != len(mat2):
        return NotImplemented
    x = cast.autocast(input)
    E, n, k = x.shape
    runs = [(e, e * n, e * n + n) for e in range(E)] if n else []
    y = _product(x.reshape(E * n, k), mat2, runs, False)
    return y if y is NotImplemented else y.view(E, n, y.shape[-1])


def _grouped(input: Any, weight: Any, offs: Tensor | None = None, bias: Tensor | None = None,
             out_dtype: torch.dtype | None = None) -> Any:
    """offs: the end of each expert's rows."""
    if not isinstance(weight, Stack) or weight.form.expert is not None or offs is None \
            or isinstance(input, Stack) or bias is not None or out_dtype not in (None, input.dtype):
        return NotImplemented
    if simulated(offs):                          # who goes where is not known: the costs are alike
        return _product(input, weight, [(0, 0, len(input))], False)
    ends = offs.tolist()
    runs = [(e, a, b) for e, (a, b) in enumerate(pairwise([0, *ends])) if a < b]
    return _product(input, weight, runs, False)


# -- views ----------------------------------------------------------------------------------------
def _getitem(W: Any, index: Any) -> Any:
    if not isinstance(W, Stack) or W.form.expert is not None:
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in _WHOLE:
        index = 0 if simulated(index) else int(index)
    if type(index) is not int or not -len(W) <= index < len(W):
        return NotImplemented
    return _new(W.form._replace(expert=index % len(W)))


def _transpose(W: Stack, dim0: int, dim1: int) -> Any:
    n = W.dim()
    return _turn(W) if {dim0 % n, dim1 % n} == {n - 2, n - 1} else NotImplemented


def _turn(W: Stack) -> Any:
    return _new(W.form._replace(turned=not W.form.turned))


def _t(W: Stack) -> Any:
    return NotImplemented if W.form.expert is None else _turn(W)


def _nowhere(W: Stack) -> int:
    return 0


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

#: function, or the name of an operator of somebody's -> what a stack answers, or NotImplemented
_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(each_name("matmul __matmul__ mm"), _matmul),
    **dict.fromkeys(each_name("bmm"), _bmm),
    **dict.fromkeys(each_name("transpose swapaxes swapdims"), _transpose),
    **dict.fromkeys(each_name("t"), _t),
    **dict.fromkeys(each_name("_grouped_mm"), _grouped),
    F.linear: _linear, Tensor.__getitem__: _getitem, Tensor.data_ptr: _nowhere,
    Tensor.T.__get__: _t, Tensor.mT.__get__: _turn, "transformers.grouped_mm_fallback": _grouped}
