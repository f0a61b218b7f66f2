"""What a tape puts in a tensor's place: the tensor with its version, or how to make it again.

A note is right only while nothing it stands on has moved. Every tensor counts its changes
(``_version``, shared by all its views); an entry remembers the counts of its output and of its
arguments at the time the operation ran, and nobody takes a note whose counts have moved since.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from . import replay
from .functions import storage_of, version_of
from .roles import IN_THE_MEAN

if TYPE_CHECKING:
    from .roles import Role
    from .saved import Tape

Recompute = Callable[..., Tensor]
#: notes that stand on notes: deeper than this the tensor is kept (making it again is recursive)
DEPTH = 32


class View:
    """One way to look at a storage: element type, sizes, strides, and where it begins (bytes)."""

    __slots__ = ("dtype", "size", "stride", "at", "conj", "neg")

    def __init__(self, t: Tensor, start: int = 0):
        self.dtype, self.size, self.stride = t.dtype, t.size(), t.stride()
        self.at = t.storage_offset() * t.element_size() - start
        self.conj, self.neg = t.is_conj(), t.is_neg()

    def of(self, value: Tensor, start: int = 0) -> Tensor:
        """The same view of the storage behind `value`, `start` bytes further on."""
        offset = (start + self.at) // self.dtype.itemsize
        if value.dtype == self.dtype:
            made = value.as_strided(self.size, self.stride, offset)
        else:            # flat bytes; complex numbers looked at as pairs, and back
            made = torch.empty(0, dtype=self.dtype, device=value.device)
            made.set_(value.untyped_storage(), offset, self.size, self.stride)
        made = made.conj() if self.conj else made
        return made._neg_view() if self.neg else made


class Kept:
    """A tensor kept as it is, with the version autograd saw."""

    __slots__ = ("tensor", "version", "__weakref__")

    def __init__(self, t: Tensor):
        # an operation's own output would close a cycle: tensor -> node -> tensor
        self.tensor = t if t.grad_fn is None else t.detach()
        self.version = version_of(t)

    @property
    def intact(self) -> bool:
        return version_of(self.tensor) == self.version

    def open(self) -> Tensor:
        if not self.intact:
            raise RuntimeError(
                f"a tensor needed for backward, {tuple(self.tensor.shape)} of "
                f"{self.tensor.dtype}, was modified in place after the forward (version "
                f"{version_of(self.tensor)}, expected {self.version}); clone it before changing it")
        return self.tensor


class Seen:
    """Tensors that are read, not kept, and read again in backward: they must be as they were.

    Holds what a module holds anyway (parameters, codes of a quantised weight) and one number each.
    """

    __slots__ = ("tensors", "versions")

    def __init__(self, tensors: Iterable[Tensor] = ()):
        self.tensors = tuple(tensors)
        self.versions = tuple(version_of(t) for t in self.tensors)

    @property
    def intact(self) -> bool:
        return all(version_of(t) == v for t, v in zip(self.tensors, self.versions, strict=True))

    def check(self, now: Sequence[Tensor], name: Callable[[int], str]) -> None:
        """RuntimeError, as autograd has it, when one of `now` is not what was seen."""
        if len(now) != len(self.tensors):
            raise RuntimeError("the tensors of a tuned layer changed between forward and backward "
                               f"({len(self.tensors)}, now {len(now)}); run the forward again")
        for k, (t, was, version) in enumerate(zip(now, self.tensors, self.versions, strict=True)):
            if t is not was:
                raise RuntimeError(f"{name(k)} was replaced between forward and backward; run the "
                                   "forward again after replacing it")
            if version_of(t) != version:
                raise RuntimeError(
                    f"{name(k)}, needed for backward, was modified in place (version "
                    f"{version_of(t)}, expected {version}); run backward before changing it, or "
                    "the forward again")


_NOTHING = Seen()


class Entry:
    """How to make one tensor again: an operation on arguments, packed once somebody asks.

    out: the tensor, or what it is a view of, weakly (the tape sets it). seen: versions of the
    tensors among the arguments, None once one is about to change. reads: tensors that `fn` looks
    up by itself.
    """

    __slots__ = ("fn", "args", "kwargs", "out", "version", "seen", "reads", "shape", "depth",
                 "autocast", "readers", "left", "value", "changed", "settled", "linear",
                 "approximate", "products", "wanted", "__weakref__")

    out: Any

    def __init__(self, fn: Recompute, args: tuple, kwargs: dict, out: Tensor, depth: int = 0,
                 reads: Iterable[Tensor] = ()):
        self.fn, self.args, self.kwargs, self.depth = fn, args, kwargs, depth
        self.version = version_of(out)
        self.shape = out.dtype, out.size(), out.stride(), out.storage_offset()
        self.seen: tuple[int, ...] | None = tuple([version_of(t) for t in self.tensors()])
        self.reads = Seen(reads) if reads else _NOTHING
        self.autocast = replay.autocast_state(out.device)
        self.readers = self.left = self.changed = 0
        self.value: Tensor | None = None
        self.settled = False
        self.linear = self.approximate = False       # see Tape.note
        self.products = 0                            # on the way from what is kept to this
        self.wanted = True                           # False: only if an activation reads it

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, before they are packed."""
        given = (*self.args, *self.kwargs.values()) if self.kwargs else self.args
        return [a for a in given if isinstance(a, Tensor)]

    @property
    def intact(self) -> bool:
        """Would the operation still make the tensor it made?"""
        if self.seen is None or not (self.reads is _NOTHING or self.reads.intact):
            return False
        if self.settled:
            return all([getattr(a, "intact", True) for a in (*self.args, *self.kwargs.values())])
        return self.seen == tuple([version_of(t) for t in self.tensors()])

    def settle(self, tape: Tape, role: Role | None = None) -> bool:
        """A reader has come: the arguments go where kept tensors go. False: it is too late.

        role: of the first reader. One to whom a code would do makes do with codes of the arguments,
        and the entry is `approximate` from then on.
        """
        if not self.intact:
            return False
        if not self.settled:
            if not self.linear or role not in IN_THE_MEAN:
                role = None
            self.approximate = self.approximate or role is not None
            self.settled = True
            self.args = tuple(tape.argument(a, role) for a in self.args)
            self.kwargs = {k: tape.argument(v, role) for k, v in self.kwargs.items()}
        return True

    def before(self, storage: int, tape: Tape) -> None:
        """Memory is about to change: whoever waits for this tensor gets it as it is now."""
        if not self.settled:
            if any(storage_of(t) == storage for t in (*self.tensors(), *self.reads.tensors)):
                self._forget(None)
            return
        kept = [a.tensor for a in (*self.args, *self.kwargs.values()) if isinstance(a, Kept)]
        if not any(storage_of(t) == storage for t in (*kept, *self.reads.tensors)):
            return
        out = self.out()
        if out is None or version_of(out) != self.version or storage_of(out) == storage:
            out = self._run()
            out = out.clone() if storage_of(out) == storage else out
        elif out.size() != self.shape[1]:            # what stands for a view of it
            out = out.detach().as_strided(*self.shape[1:])
        self._forget(())
        self.fn, self.args = _as_it_is, (tape.policy.pack(out),)
        tape.stands_on(self, storage_of(out))

    def _forget(self, seen: tuple[int, ...] | None) -> None:
        self.args, self.kwargs, self.seen, self.reads = (), {}, seen, _NOTHING

    def _run(self) -> Tensor:
        self.reads.check(self.reads.tensors, lambda k: "a weight")
        with torch.no_grad(), replay.autocast(self.autocast):
            return self.fn(*[opened(a) for a in self.args],
                           **{k: opened(v) for k, v in self.kwargs.items()})

    def make(self) -> Tensor:
        """The tensor; shared until the last reader has asked, or this backward is over."""
        self.left -= 1
        value = self.value
        if value is None or version_of(value) != self.changed:
            value = self._run()
            _, size, stride, _ = self.shape
            if value.stride() != stride:
                value = torch.empty_strided(size, stride, dtype=value.dtype,
                                            device=value.device).copy_(value)
        if self.left <= 0:
            self.release()
        elif self.value is not value and self._until_the_end():
            self.value, self.changed = value, version_of(value)
        return value

    def _until_the_end(self) -> bool:
        """Let the value go when this backward ends, if readers are left that it does not reach."""
        me = weakref.ref(self)

        def over() -> None:
            entry = me()
            if entry is not None:
                entry.release()

        try:
            Variable._execution_engine.queue_callback(over)
        except RuntimeError:                     # opened by hand, outside of any backward
            self.release()
            return False
        return True

    def release(self) -> None:
        """Nothing is shared any more; a second backward starts counting again."""
        self.value, self.left = None, self.readers


class Note:
    """What autograd keeps instead of a tensor: an entry and the view that was wanted."""

    __slots__ = ("entry", "view")

    def __init__(self, entry: Entry, t: Tensor):
        self.entry = entry
        entry.readers += 1
        entry.left += 1
        dtype, size, stride, offset = entry.shape
        same = (t.size() == size and t.stride() == stride and t.storage_offset() == offset
                and t.dtype is dtype and not t.is_conj() and not t.is_neg())
        self.view = None if same else View(t, offset * dtype.itemsize)

    @property
    def intact(self) -> bool:
        return self.entry.intact

    def open(self) -> Tensor:
        value = self.entry.make()
        if self.view is None:
            return value
        return self.view.of(value, value.storage_offset() * value.element_size())


def _as_it_is(value: Tensor) -> Tensor:
    return value


def opened(x: Any) -> Any:
    """A packed argument as a tensor; anything else as it is."""
    return x.open() if hasattr(x, "open") else x
