"""All or nothing: a change of a tuned model that is refused, fails or is interrupted leaves every
module, flag and value as it was.

Joining touches structure (classes, children, flags), which is noted shallowly beforehand: a few
references for each module. Values are noted by whoever overwrites them, just before. Taking a
recipe out goes the other way: it ends in values that wait aside, so it is carried to its end.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.processes import assign, here
from .originals import Originals

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_CONTAINERS = (dict, list, set, deque)           # OrderedDict is a dict


class Transaction:
    """What a model and some objects were when it began.

    objects: whose attributes are put back too, containers among them with what they held.
    """

    def __init__(self, model: nn.Module, *objects: Any):
        self.modules = [(m, type(m), _Attributes(m)) for m in model.modules()]
        self.objects = [_Attributes(o) for o in objects]
        self.parameters = [(p, p.requires_grad, dict(vars(p))) for p in model.parameters()]
        self.backs: list[Callable[[], None]] = []
        self.values = Originals()
        self.grad = torch.is_grad_enabled()      # an interrupt may fall between a body and its exit

    def later(self, back: Callable[[], None]) -> None:
        """Call `back` on the way back, the newest first; it must bear to be called twice."""
        self.backs.append(back)

    def keep(self, tensor: Tensor, value: Callable[[], Tensor] | None = None) -> None:
        """The tensor is about to be overwritten: its value comes back on the way back.

        value: where it waits already; else a copy is taken (large ones wait on disk).
        """
        if value is None:
            key = ("", str(len(self.backs)))
            tensor = here(tensor)                # each process its own part
            self.values.put(*key, tensor)
            value = functools.partial(self.values.get, *key)
        self.later(functools.partial(_put, tensor, value))

    def roll_back(self) -> None:
        torch.set_grad_enabled(self.grad)
        for back in reversed(self.backs):
            back()
        for module, cls, attributes in self.modules:
            module.__class__ = cls
            attributes.put_back()
        for attributes in self.objects:
            attributes.put_back()
        for p, flag, own in self.parameters:
            p.requires_grad_(flag)
            vars(p).clear()
            vars(p).update(own)
        self.values.clear()


class _Attributes:
    """The attributes of an object, and what its containers hold."""

    def __init__(self, of: Any):
        self.of = of
        self.own = dict(vars(of))
        self.held = [(v, v.copy()) for v in self.own.values() if isinstance(v, _CONTAINERS)]

    def put_back(self) -> None:
        vars(self.of).clear()
        vars(self.of).update(self.own)
        for container, held in self.held:
            if _as_was(container, held):         # a frozen one (diffusers' configs) is no other
                continue
            container.clear()
            if isinstance(container, dict | set):
                container.update(held)
            else:
                container.extend(held)


def _as_was(container: Any, held: Any) -> bool:
    """Does it hold the very things that it held?"""
    if isinstance(container, dict):
        container, held = (sum(c.items(), ()) for c in (container, held))
    return [id(x) for x in container] == [id(x) for x in held]


def _put(tensor: Tensor, value: Callable[[], Tensor]) -> None:
    assign(tensor, value())


def all_or_nothing(change: F) -> F:
    """A method of a handle that is done whole or not at all; ``self.undo`` is its transaction.

    One that is called inside another belongs to it.
    """
    @functools.wraps(change)
    def run(self: Any, *args: Any, **kw: Any) -> Any:
        if self.undo is not None:
            return change(self, *args, **kw)
        undo = Transaction(self.model, self, *self.recorded())
        try:
            self.undo = undo
            made = change(self, *args, **kw)
            self.undo = None
        except BaseException:
            undo.roll_back()                     # `self.undo` too: it was None
            raise
        undo.values.clear()
        return made

    return run                                   # type: ignore[return-value]


def whole(model: nn.Module, change: Callable[[Transaction], T]) -> T:
    """``change(transaction)`` on a model, done whole or not at all."""
    undo = Transaction(model)
    try:
        made = change(undo)
    except BaseException:
        undo.roll_back()
        raise
    undo.values.clear()
    return made


def to_the_end(change: Callable[[], None]) -> None:
    """Do what can be done twice; when it is interrupted, once more, so that it ends."""
    grad = torch.is_grad_enabled()
    try:
        change()
    except BaseException:
        torch.set_grad_enabled(grad)             # it may have fallen between a body and its exit
        change()
        raise
