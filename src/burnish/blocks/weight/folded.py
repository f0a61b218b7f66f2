"""What evaluation makes of tensors that stay as they are, made once.

A generation asks every layer for the same function of the same tensors, token after token. Where
no graph is wanted and the model is in evaluation mode, what a layer makes of them on the way (the
threshold of a matrix, the lengths of its rows, the panels of ``V``) is kept, and the same
operations run on it again: an answer has the same bits with and without.

    small   of the order of the adapter itself, at most: kept in any case
    large   of the size of the weight: kept while all of them together fit the model's `limit`

A value is used only while everything it was made of is as it was. A :class:`Fold` knows each tensor
by itself, by its memory and layout and by its count of changes (``_version``), and all plain values
of the terms. A write through ``.data`` counts as none, as for autograd; so going to ``train()`` or
``eval()`` empties the room too. And so does every forward that makes a graph: what is kept here
never stands beside what a training step needs.

Not kept: what reads the call; what has no count of changes (tensors of inference mode, wrappers);
weights that are computed anew each time; whatever runs under a transform, in a graph (compiled, or
captured by CUDA) or in a process of several, where parameters may be gathered piece by piece.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ...core.call import overheard
from ...core.followed import compiling
from ..tape.functions import backward_runs, storage_of, transformed, version_of

if TYPE_CHECKING:
    from .provided import Weighted

T = TypeVar("T")
#: bytes of large values that a model keeps where nobody has said how many: all that a model of some
#: hundred million parameters has, and never as much as a large one's weights
LIMIT = 512 << 20
_PLAIN = (int, float, str, bool, type(None))


class Made:
    """Values made of tensors as they are at one time; here none is kept."""

    def found(self, name: str) -> Any:
        """A value that is kept, or None."""
        return None

    def making(self) -> AbstractContextManager[Any]:
        """Where a value is made that :meth:`keep` is then given."""
        return nullcontext()

    def keep(self, name: str, value: Any) -> None:
        """Keep a small value."""

    def small(self, name: str, make: Callable[[], T]) -> T:
        """``make()``, of the first time."""
        return make()

    def large(self, name: str, nbytes: int, make: Callable[[], T]) -> T | None:
        """The same of a value of so many bytes; None where there is no room for it."""
        return None


NOTHING = Made()


class Room:
    """Where one model keeps what its evaluation has made.

    limit: bytes that large values may take together. Those that come first stay.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.used = 0
        self.lock = threading.RLock()
        self.held: set[Kept] = set()
        self._version = -1

    def opens(self, version: int, evaluating: bool) -> None:
        """A forward begins, of what was planned at `version`."""
        if not evaluating or version != self._version:
            self.clear()
            self._version = version

    def clear(self) -> None:
        """Let everything go; a forward that is under way finishes with what it has in hand."""
        if self.held:
            with self.lock:
                for made in list(self.held):
                    made.let_go()

    def tensors(self) -> list[Tensor]:
        """All that is kept just now."""
        with self.lock:
            return [t for made in self.held for t in pytree.tree_leaves(made.values)
                    if isinstance(t, Tensor)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        new = memo[id(self)] = Room(self.limit)
        return new

    def __reduce__(self) -> tuple:
        return Room, (self.limit,)


class Kept(Made):
    """Values that a room keeps. facts: what they are made of; tensors: those among it."""

    def __init__(self, room: Room, facts: list[Any], tensors: Sequence[Tensor]):
        self.room, self.facts = room, facts
        self.alive = [ref(t) for t in tensors]
        self.memory = [StorageWeakRef(t.untyped_storage()) for t in tensors]   # not used again
        self.values: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.told = False                        # has a make asked the call?
        self.gone = False
        room.held.add(self)

    def still(self, facts: list[Any]) -> bool:
        """Would the same be made now?"""
        return not self.gone and self.facts == facts and all(r() is not None for r in self.alive)

    def let_go(self) -> None:
        """With the room locked: nothing of this is wanted any more."""
        if not self.gone:
            self.gone = True
            self.room.held.discard(self)
            self.room.used -= sum(self.sizes.values())
            self.values, self.sizes = {}, {}

    def found(self, name: str) -> Any:
        return self.values.get(name)

    @contextmanager
    def making(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.no_grad(), overheard() as asked:
            yield
        self.told = self.told or bool(asked)

    def keep(self, name: str, value: Any) -> None:
        with self.room.lock:
            if not self.gone and not self.told:
                self.values.setdefault(name, value)

    def small(self, name: str, make: Callable[[], T]) -> T:
        value = self.values.get(name)
        if value is None:
            with self.making():
                value = make()
            self.keep(name, value)
        return value

    def large(self, name: str, nbytes: int, make: Callable[[], T]) -> T | None:
        value = self.values.get(name)
        if value is not None:
            return value
        with self.room.lock:
            if self.gone or name in self.sizes or self.room.used + nbytes > self.room.limit:
                return None                      # no room, or another thread is making it
            self.sizes[name] = nbytes
            self.room.used += nbytes
        try:
            return self.small(name, make)
        finally:
            with self.room.lock:
                if not self.gone and name not in self.values:
                    self.room.used -= self.sizes.pop(name)


class Fold:
    """What one weight has made, for each dtype (and stream) that asks."""

    def __init__(self, room: Room):
        self.room = room
        self.made: dict[Any, Kept] = {}

    def now(self, ops: Sequence[Weighted], like: Tensor) -> Made:
        """The values that hold now, for an input like this."""
        if compiling() or torch.is_grad_enabled() or backward_runs() \
                or transformed() \
                or any(_trains(t) for op in ops for t in op.all) or _several():
            return NOTHING
        key: Any = like.dtype
        if like.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return NOTHING
            key = like.dtype, torch.cuda.current_stream(like.device)
        tensors: list[Tensor] = []
        facts = _facts(ops, tensors)
        made = self.made.get(key)
        if made is not None and facts is not None and made.still(facts):
            return made
        with self.room.lock:
            if made is not None:
                made.let_go()
            if facts is None:
                self.made.pop(key, None)
                return NOTHING
            now = self.made.get(key)             # another thread was here first
            if now is None or not now.still(facts):
                if now is not None:
                    now.let_go()
                now = self.made[key] = Kept(self.room, facts, tensors)
            return now

    def __deepcopy__(self, memo: dict[int, Any]) -> Fold:
        return Fold(copy.deepcopy(self.room, memo))

    def __reduce__(self) -> tuple:
        return Fold, (self.room,)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _facts(ops: Sequence[Weighted], tensors: list[Tensor]) -> list[Any] | None:
    """All that a value depends on, to be compared; None where some of it cannot be told. The
    tensors among it are added to `tensors`."""
    facts: list[Any] = []
    for op in ops:
        if not (held := op.held()):
            return None                          # the weight is computed anew each time
        tensors += (*op.reads(True, True, False), *held)
        for term in op.all:
            for m in _parts(term):
                facts += [(k, v) for k, v in vars(m).items() if _plain(v)]
    for t in tensors:
        version, storage = version_of(t), storage_of(t)
        if version < 0 or storage is None or hasattr(t, "__tensor_flatten__"):
            return None
        facts.append((id(t), storage, version, t.dtype, t.size(), t.stride(), t.storage_offset()))
    return facts


def _trains(term: nn.Module) -> bool:
    return getattr(term, "term", term).training      # one that stands for another has no mode


def _parts(term: nn.Module) -> Iterator[nn.Module]:
    """A term and what it is made of, also where others own it."""
    waiting, seen = [term], set()
    while waiting:
        m = waiting.pop()
        if m not in seen:
            seen.add(m)
            yield m
            waiting += [h for h in (*m._modules.values(), *vars(m).values())
                        if isinstance(h, nn.Module)]


def _plain(v: Any) -> bool:
    return type(v) in _PLAIN or type(v) is tuple and all(map(_plain, v))
