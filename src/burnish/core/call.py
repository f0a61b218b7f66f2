"""The call: what one forward of a tuned model reads from beside its arguments.

    model(**batch)
      +-- open            the root takes the declared keys off the batch and fixes what is active
      |     module        its branches and terms ask context(): .valid, .need("task"), ...
      |     block         one that backward runs again reads the same facts and an empty box
      +-- close           the box is emptied; what waits for backward keeps the call
    tuned.use(...), tuned.disabled(), another forward ...
    loss.backward()
      +-- resume          a block run again, a weight made again: in the call of *its* forward

A call is fixed when it opens. It belongs to the thread that opened it, so two threads may run one
model at once, and backward, whenever it comes, computes what that forward computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError
from .followed import compiling


@dataclass(eq=False)
class Call:
    """One forward. Facts are fixed; `box` and `standing` belong to the run that is under way.

    owner: the shared state of the model's slots.
    active, rows: which adapters answer, and which per sample.
    off: the base answers alone; `base` then gives its value of a tensor that trains.
    version: of the shared state when the call opened. grad: did it open with a graph?
    samples: leading sizes of the tensors the model was called with, the first one's first.
    valid: the (batch, tokens) attention mask the model was called with, or None: all count.
    given: the declared keys of the batch by name: task, domain, modality, whatever a part reads.
    noted: what was made of the input alone, once, for all that read it, blocks that run again too.
    ahead: name of a part -> what it found out before this forward (`Method.ahead`).
    box: what one module leaves for another within this forward.
    standing: (id of a module, parameter) -> the tensor that answers for it just now.
    """

    owner: Any = None
    active: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None
    off: bool = False
    base: Callable[[Any, str], Tensor | None] | None = None
    version: int = 0
    grad: bool = field(default_factory=torch.is_grad_enabled)
    samples: tuple[int, ...] = ()
    valid: Tensor | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    noted: dict[Any, Any] = field(default_factory=dict)
    ahead: dict[str, Any] = field(default_factory=dict)
    box: dict[Any, Any] = field(default_factory=dict)
    standing: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def inner(self, **changed: Any) -> Call:
        """The same facts (or `changed` ones) with nothing in the box: a run of its own inside."""
        return replace(self, box={}, standing={}, **changed)

    def aside(self) -> Call:
        """The same facts and a copy of the box: a run beside, which takes nothing out of it that
        others wait for, and leaves nothing in it."""
        box = {k: [*v] if isinstance(v, list) else v for k, v in self.box.items()}
        return replace(self, box=box)

    def need(self, key: str) -> Any:
        """A declared key of the batch. RecipeError when the batch did not bring it."""
        try:
            return self.given[key]
        except KeyError:
            has = f"it brought {', '.join(self.given)}" if self.given else "it brought none"
            raise RecipeError(f"a part of the recipe reads {key!r} of the batch; {has}") from None

    def per_row(self, key: str, x: Tensor) -> Tensor:
        """A key's entries for the rows of a hidden state: (1,) where one serves all of them, else
        (len(x),). The first axis of x is the batch, or a multiple of it that keeps each sample's
        rows together (windows, tokens of a flattened batch)."""
        value, _ = self.by_entry(key, x)
        return value if len(value) in (1, len(x)) else \
            value.repeat_interleave(len(x) // len(value))

    def by_entry(self, key: str, x: Tensor, dims: int = 0) -> tuple[Tensor, Tensor]:
        """(a key's entries, a hidden state by entries): (n,) and (n, rows of each, ...), where x is
        what :meth:`per_row` takes. dims: of one sample's entry, where it is more than a number."""
        value = torch.as_tensor(self.need(key), device=x.device)
        value = value.unsqueeze(0) if value.dim() == dims else value
        n = len(value)
        if len(x) % n:
            raise RecipeError(f"{key!r} has {n} entries, and a layer is given "
                              f"{len(x)} rows: give one entry per sample, or one for all")
        return value, x.unflatten(0, (n, len(x) // n))


class _Overheard(Call):
    """A call that notes what of it is read that differs from batch to batch."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("valid", "given", "rows", "noted", "box"):
            super().__getattribute__("asked").append(name)
        return super().__getattribute__(name)


class _Here(threading.local):
    """The calls this thread is in, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.off: list[tuple[Any, Any]] = []         # (owner, its base) switched off here
        self.given: list[tuple[Any, dict[str, Any]]] = []     # (owner, keys) beside any batch
        self.rows: list[tuple[Any, tuple[tuple[str | None, ...], int]]] = []


_here = _Here()
_counting = threading.Lock()


def context() -> Call:
    """The call that is under way in this thread; an empty one outside any forward."""
    return current() or Call()


def current() -> Call | None:
    """The call that is under way in this thread, or None (a graph that is compiled has none)."""
    if compiling():
        return None
    calls = _here.calls
    return calls[-1] if calls else None


def call_of(owner: Any) -> Call | None:
    """The innermost call of one model in this thread (a tuned model may hold another)."""
    for call in reversed(_here.calls):
        if call.owner is owner:
            return call
    return None


def answer(module: Any, name: str) -> Tensor | None:
    """What stands for ``module.<name>`` in this thread just now instead of its own tensor."""
    if compiling():
        return None
    for call in reversed(_here.calls):
        value = call.standing.get((id(module), name))
        if value is None and call.base is not None:
            value = call.base(module, name)
        if value is not None:
            return value
    for _, base in () if _here.calls else reversed(_here.off):     # read outside any forward
        if (value := base(module, name)) is not None:
            return value
    return None


def switched_off(owner: Any) -> tuple[bool, Any]:
    """(is this model's recipe off in this thread, what then gives the base's values)."""
    for who, base in reversed(_here.off):
        if who is owner:
            return True, base
    return False, None


def given_to(owner: Any) -> dict[str, Any]:
    """The keys that :func:`giving` holds for this model in this thread."""
    return {k: v for who, keys in _here.given if who is owner for k, v in keys.items()}


@contextmanager
def giving(owner: Any, keys: dict[str, Any]) -> Iterator[None]:
    """Calls of this model that open inside, in this thread, are given these keys as well."""
    _here.given.append((owner, keys))
    try:
        yield
    finally:
        _here.given.pop()


def rows_given(owner: Any) -> tuple[tuple[str | None, ...], int] | None:
    """(the adapter of each sample, copies of a sample that may follow each other) that
    :func:`by_rows` says for this model in this thread; None where it says nothing."""
    return next((given for who, given in reversed(_here.rows) if who is owner), None)


@contextmanager
def by_rows(owner: Any, rows: tuple[str | None, ...], copies: int) -> Iterator[None]:
    """Calls of this model that open inside, in this thread, have an adapter for each sample."""
    _here.rows.append((owner, (rows, copies)))
    with _counting:
        owner.rows_here += 1                         # compiled graphs watch it
    try:
        yield
    finally:
        _here.rows.pop()
        with _counting:
            owner.rows_here -= 1


@contextmanager
def off(owner: Any, base: Callable[[Any, str], Tensor | None]) -> Iterator[None]:
    """Calls of this model that open inside, in this thread, are answered by the base alone."""
    _here.off.append((owner, base))
    with _counting:
        owner.off_here += 1                          # compiled graphs watch it
    try:
        yield
    finally:
        _here.off.pop()
        with _counting:
            owner.off_here -= 1


@contextmanager
def resume(call: Call | None) -> Iterator[None]:
    """Inside, this thread is in `call` (None changes nothing)."""
    if call is None:
        yield
        return
    calls = _here.calls
    calls.append(call)
    try:
        yield
    finally:
        calls.pop()


@contextmanager
def again(call: Call | None, loose: dict[Any, Any] | None = None) -> Iterator[None]:
    """Inside, a run of its own in `call`: the same facts, a box that is empty before and after.

    loose: states that wait outside any call, for modules that are run one by one; what nobody has
    taken waits there again.
    """
    if call is None:
        yield
        return
    own = call.inner()
    own.box.update(loose or {})
    with resume(own):
        try:
            yield
        finally:
            if loose is not None:
                loose.clear()
                loose.update({k: v for k, v in own.box.items() if k in call.owner.readers})
            own.box.clear()


@contextmanager
def overheard() -> Iterator[list[str]]:
    """What is read of the call inside that differs from batch to batch: names, as they are read."""
    call, asked = current(), list[str]()
    if call is None:
        yield asked
        return
    listening = object.__new__(_Overheard)
    vars(listening).update(vars(call), asked=asked)
    with resume(listening):
        yield asked
