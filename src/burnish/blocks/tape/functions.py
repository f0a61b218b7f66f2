"""What every autograd function of ours keeps to.

* Its result may be changed in place, so it is no view (:func:`shaped`).
* What it reads again in backward is as it was, or backward raises (:class:`~.notes.Seen`); who
  wants a gradient is decided in forward (:func:`as_required`), as autograd has it.
* Inside, no tape watches (:class:`unwatched`): it says itself what it keeps.
* Where it cannot be differentiated, twice or under ``torch.func``, it says so, or steps aside for
  plain functions (:func:`transformed`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ...core.followed import compiling, step_by_step


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a backward that cannot be differentiated, and says so when a graph of it is asked for.

    torch's own mark says it only to a second backward that runs through it; one that asks for some
    tensors alone (``autograd.grad(g, inputs)``, a product with the Hessian) goes round it, and
    leaves out in silence all that it stands for.
    """
    inner = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not compiling():
            raise RuntimeError(
                "create_graph=True asks for a graph of a gradient that burnish makes by hand, and "
                "is once_differentiable; for second derivatives take torch.func (jvp, grad, "
                "hessian of torch.func.functional_call), where plain operations run")
        return inner(ctx, *grads)

    return once


def storage_of(t: Tensor) -> int | None:
    """Which memory a tensor lives in; None where it has none of its own (sparse, wrappers)."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def version_of(t: Tensor) -> int:
    """How often a tensor has been changed in place; one of inference mode cannot be."""
    try:
        return t._version
    except RuntimeError:
        return -1


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh result in another shape, and no view: views made inside a function are read-only.

    Nobody else may hold `y`.
    """
    return y if y.shape == torch.Size(shape) else torch.ops.aten._unsafe_view.default(y, shape)


def unviewed(made: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results that may be changed in place: what is a view of memory nobody else has loses that
    mark. A result that is, or shares memory with, something `given` or another result stays a
    view, which torch refuses to change."""
    where = Counter(storage_of(t) for t in made)
    where.update(storage_of(t) for t in given)
    same = {id(t) for t in given}
    out = []
    for v in made:
        if id(v) in same:
            v = v.view_as(v)
        elif v._is_view() and where[storage_of(v)] == 1 and not (v.is_conj() or v.is_neg()):
            v = v.new_empty(0).set_(v.untyped_storage(), v.storage_offset(), v.size(), v.stride())
        out.append(v)
    return tuple(out)


def transformed() -> bool:
    """Is a transform at work (``torch.func.grad``, ``vmap``, forward-mode differentiation), or is
    each operation written down?

    It reads what runs, operation by operation, so functions with a backward of their own
    give way to the plain form, and nothing is kept leaner than stock.
    """
    if compiling():
        return False
    return step_by_step() or torch._C._are_functorch_transforms_active() \
        or forward_ad._current_level >= 0


def plainly(theta: Sequence[Tensor]) -> bool:
    """Must the differentiable form run: under a transform, or on tensors that somebody has put in
    the place of parameters for one call (``torch.func.functional_call``)?"""
    return transformed() or not all(isinstance(t, nn.Parameter) for t in theta)


def is_stored(weight: Tensor) -> bool:
    """Is it, or is it a view of, a parameter some module owns? Keeping it costs nothing."""
    return not compiling() and isinstance(
        weight._base if weight._is_view() else weight, nn.Parameter)


class unwatched:
    """Inside, the tape that watches this thread sees nothing, as in backward.

    For functions of ours: what runs there is kept by nobody and changes nothing that others hold,
    and a tape would be told of each shape that is read. Another mode that was entered after the
    tape goes on watching, and the tape below it.
    """

    __slots__ = ("mode",)

    def __enter__(self) -> None:
        n = torch._C._len_torch_function_stack()
        top = torch._C._get_function_stack_at(n - 1) if n else None
        self.mode = torch._C._pop_torch_function_stack() if hasattr(top, "watches_for_us") else None

    def __exit__(self, *_: object) -> None:
        if self.mode is not None:
            torch._C._push_on_torch_function_stack(self.mode)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, :class:`unwatched`."""
    if compiling():
        return function.apply(*args)
    with unwatched():
        return function.apply(*args)


def backward_runs() -> bool:
    """Is this thread inside a backward?"""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def as_required(tensors: Sequence[Tensor], flags: Sequence[bool]) -> Iterator[None]:
    """Tensors require gradients inside as they did in forward (adapters may have been switched)."""
    moved = [(t, f) for t, f in zip(tensors, flags, strict=True) if t.requires_grad != f]
    try:
        for t, f in moved:
            t.requires_grad_(f)
        yield
    finally:
        for t, f in moved:
            t.requires_grad_(not f)


def upon(outer: Callable[..., Any] | None, answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer`, an ``f(func, args, kwargs)``, given what `outer` answers in func's place."""
    if outer is None:
        return answer
    return lambda func, args, kwargs: answer(lambda *a, **k: outer(func, a, k), args, kwargs)
