"""The lean tape: what backward keeps, decided tensor by tensor.

Autograd keeps the output of a norm for the linear behind it, and the input of that norm for the
norm itself: the second determines the first. The tape watches cheap operations (norms,
activations, products, widening casts, dropout). When autograd is about to keep the *output* of
one, it gets a note instead: which operation, on which inputs; those are kept anyway, or are
notes themselves. Backward reads the note, runs the operation once and shares the result with
all its readers. Gradients are exact, since the same operation runs on the same numbers.

Dropout keeps a generator state instead of a mask and draws bit for bit what the stock one draws.

Tensors that change in place: one that has changed since it was noted, or whose arguments have, is
kept as it is. An argument that is about to change when notes stand on it already makes those
notes into tensors first; the tape sees every change that Python asks torch for while it watches.
What changes later is known by its version when backward asks, and raises as autograd does.

Traps this file avoids: an address alone does not name a tensor (addresses are reused), so every
entry holds a weak reference to its tensor; a pack hook that returns an operation's own output
closes a reference cycle, so pass-through returns an alias.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.call import Call, current
from ...core.followed import compiling
from . import activations, replay, roles, unread
from .functions import backward_runs, storage_of, transformed, upon, version_of
from .notes import DEPTH, Entry, Kept, Note, Recompute
from .roles import Role
from .unmade import Logits
from .watched import ACTIVATIONS, PRODUCTS, Watched, always, in_rows


def _nothing() -> None:
    """Nobody listens for the start of a forward."""


class Policy:
    """Where a kept tensor lives until backward, and in what form. The default leaves it as it is.

    roles: it wants to be told what a tensor is kept for, and may replace functions.
    outer: it changes the form, so it stands before one that changes the place (`inner`).
    moves: it moves tensors later, so it wants to know which are about to change.
    beside: why a forward that is compiled would not do what it promises, or "".

    A copy or a pickle has the settings and nothing of what waits: ``__reduce__`` names them.
    """

    roles = False
    outer = False
    moves = False
    beside = ""
    inner: Policy

    def pack(self, t: Tensor, role: Role | None = None) -> Any:
        """What autograd holds instead of `t`: anything whose ``open()`` gives it back."""
        return Kept(t)

    def start(self) -> None:
        """A forward begins, or a block that backward runs again."""

    def end(self) -> None:
        """It is over."""

    def enter(self) -> None:
        """A block of the model begins."""

    def changing(self, tensors: Iterable[Tensor]) -> None:
        """These are about to change in place."""

    def replaces(self, func: Any, args: tuple, kwargs: dict) -> Callable[[Tape], Tensor] | None:
        """What runs in place of a function whose inputs carry gradients; None leaves it."""
        return None


class _Here(threading.local):
    """What a tape holds for the thread that asks: two threads may run one model at once."""

    def __init__(self) -> None:
        self.intercept: dict[Any, Callable[..., Any]] = {}
        self.known: dict[int, tuple[Any, Entry]] = {}          # storage -> (tensor, entry)
        self.stands: dict[int, list[Any]] = {}                 # storage -> entries that read it
        self.depth = 0
        self.pack: Any = None                    # the hook of the recording under way
        self.waiting: dict[Any, Any] = {}        # states between parts that are run one by one
        self.apart: dict[Any, Any] = {}          # what an encoder run by itself left a decoder
        self.opened: Any = None                  # weak reference to the call opened last


def _counted() -> bool:
    """Is this somebody else's recomputation, which counts the tensors that are saved?"""
    return backward_runs() and \
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Tape(TorchFunctionMode):
    """Watches one forward of a model. Also the one place where functions are intercepted.

    lean: note cheap outputs instead of keeping them.
    level: which products of linears are noted as well: 1 none, 2 those that an activation or a gate
    reads, 3 all.
    policy: what happens to the tensors that are kept.
    beside: why a forward that is compiled would keep something else than promised, or "".
    intercept: function -> replacement ``f(func, args, kwargs) -> result`` (prefix attention), in
    the thread that sets it.
    """

    #: functions of our own step out of its sight, see functions.py
    watches_for_us = True

    def __init__(self, lean: bool = True, policy: Policy | None = None, beside: str = "",
                 level: int = 1):
        super().__init__()
        self.lean, self.policy, self.beside = lean, policy or Policy(), beside
        self.level = level
        if self.policy.outer and not hasattr(self.policy, "inner"):
            self.policy.inner = Policy()
        self._here = _Here()
        self._watched: dict[Any, Watched] = {}
        self.on_start: Callable[[], None] = _nothing

    @property
    def intercept(self) -> dict[Any, Callable[..., Any]]:
        return self._here.intercept

    @intercept.setter
    def intercept(self, value: dict[Any, Callable[..., Any]]) -> None:
        self._here.intercept = value

    @property
    def waiting(self) -> dict[Any, Any]:
        return self._here.waiting

    @property
    def apart(self) -> dict[Any, Any]:
        return self._here.apart

    @property
    def _known(self) -> dict[int, tuple[Any, Entry]]:
        return self._here.known

    @property
    def _stands(self) -> dict[int, list[Any]]:
        return self._here.stands

    def last_opened(self) -> Call | None:
        """The call that kept what this thread's backward has asked for last.

        Whoever recomputes in backward takes his inputs from the tape first, so this is the call
        in which a module that runs now ran before.
        """
        opened = self._here.opened
        return opened() if opened is not None and backward_runs() else None

    def keep(self, policy: Policy) -> None:
        """Take a policy up: one that changes the form of what is kept stands before one that says
        where it waits, in whatever order they come. One of a kind that is there takes its place."""
        here = self.policy
        if type(policy) is type(here):
            if policy.outer:
                policy.inner = here.inner
            self.policy = policy
        elif policy.outer:
            policy.inner, self.policy = here, policy
        elif here.outer:
            self.policy = copy.copy(here)            # a change that is undone leaves it as it was
            self.policy.inner = policy
        else:
            self.policy = policy

    # -- watching -----------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        watched = self._watched.get(func)
        if watched is not None and watched.idle and not kwargs and (
                watched.read or not self.policy.roles and not self._here.intercept):
            return func(*args)                       # most of what is asked: it has to be quick
        kwargs = kwargs or {}
        if compiling():                              # the compiler decides what is kept
            return func(*args, **kwargs)
        if types and Logits in types:                # they answer for themselves
            return func(*args, **kwargs)
        intercept = self._here.intercept
        if intercept and func in intercept:
            return intercept[func](func, args, kwargs)
        if self.policy.roles and torch.is_grad_enabled() and not self.others() \
                and not transformed():
            if func is F.dropout:
                return self._dropout(func, args, kwargs)
            if (instead := self.policy.replaces(func, args, kwargs)) is not None:
                return instead(self)
            read = roles.of_function(roles.name_of(func), args, kwargs)
            if read is not None:
                with roles.reading(*read, copies=True):
                    return self._watch(func, args, kwargs)
        return self._watch(func, args, kwargs)

    def _watch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is F.linear:
            out = unread.linear(func, args, kwargs, self.others())
            if self.notes_products and out.requires_grad:
                self.note(out, unread.again(func), args, kwargs, product=True)
            return out
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return unread.addmm(func, args, self.others())
        if func is F.group_norm:
            args = in_rows(args)
        if not self.lean and not self.policy.moves:
            return func(*args, **kwargs)
        watched = self._watched.get(func)
        if watched is None:
            watched = self._watched[func] = Watched(func)
        changed = None
        if kwargs or watched.may_change:
            changed = watched.changes(args, kwargs)
            if changed:
                self._changing(changed)
        cheap = watched.cheap
        if cheap is None and self.level > 1 and func is F.relu:
            cheap = always                           # its input is a product that is made again
        if cheap is None or not self.lean or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if cheap == "dropout":
            return self._dropout(func, args, kwargs)
        if self.level > 1:
            self._read(func, args)
        if func in activations.KNOWN and not changed and not self.others():
            out = activations.run(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if (isinstance(out, Tensor) and out.requires_grad and not changed
                and cheap(out, args)):
            self.note(out, func, args, kwargs,
                      linear=self.policy.roles and roles.name_of(func) in roles.LINEAR)
        return out

    @property
    def notes_products(self) -> bool:
        """Are products of linears noted just now?"""
        return self.lean and self.level > 1 and torch.is_grad_enabled() and not self.others()

    def _read(self, func: Any, args: tuple) -> None:
        """An activation or a gate reads these: the products among them are worth making again."""
        name, read = roles.name_of(func), [t for t in args if isinstance(t, Tensor)]
        gate = name in PRODUCTS and sum(t.requires_grad for t in read) > 1
        if gate or name == "relu" or name in ACTIVATIONS:
            for t in read:
                if (entry := self._find(t)) is not None:
                    entry.wanted = True

    def _changing(self, tensors: list[Tensor]) -> None:
        """These are about to be changed: notes about them end, notes on them become tensors."""
        self.policy.changing(tensors)
        for t in tensors:
            key = storage_of(t)
            self._known.pop(key, None)
            for ref in self._stands.get(key, ()):
                entry = ref()
                if entry is not None:
                    entry.before(key, self)

    def _dropout(self, func: Any, args: tuple, kwargs: dict) -> Any:
        bound = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = bound["input"], bound.get("p", 0.5)
        if not bound.get("training", True) or bound.get("inplace") or not x.requires_grad \
                or not 0 < p < 1 or self.others():
            return func(*args, **kwargs)
        state, strides = replay.rng_state(x.device), replay.layout(x)
        out = replay.dropout(x, p)

        def again(x: Tensor) -> Tensor:
            with replay.replay(x.device, state):
                return F.dropout(replay.laid_out(x, strides), p, True)

        self.note(out, again, (x,), {}, linear=True)
        return out

    def note(self, out: Tensor, fn: Recompute, args: tuple, kwargs: dict,
             reads: Iterable[Tensor] = (), linear: bool = False, approximate: bool = False,
             product: bool = False) -> None:
        """Remember that ``fn(*args)`` makes `out`, for as long as `out` lives.

        reads: tensors that `fn` reads besides its arguments (weights); changed later, they raise.
        linear: `fn` is linear in each argument, so for a reader to whom a code of `out` would do a
        code of the arguments does. approximate: it makes such a code. product: it is the product
        of a linear; none is made again from what takes another one to make.
        """
        storage = storage_of(out)
        if storage is None or type(out) is not Tensor and hasattr(out, "__tensor_flatten__") \
                or out.untyped_storage().nbytes() != out.numel() * out.element_size():
            return                                  # a wrapper, or a view of something larger
        entry = Entry(fn, args, kwargs, out, reads=reads)
        entry.linear, entry.approximate = linear, approximate
        entry.products, entry.wanted = int(product), not product or self.level > 2
        known, stands = self._known, [storage_of(t) for t in entry.tensors()]
        if storage in stands:
            return                                  # a view or a cast that did nothing
        for key in stands:
            if key in known:
                below = known[key][1]
                entry.depth = max(entry.depth, below.depth + 1)
                if below.wanted:                     # (else it is kept)
                    entry.products = max(entry.products, below.products + product)
        if entry.depth > DEPTH or entry.products > 1:
            return

        def forget(ref: Any, key: int = storage) -> None:
            if known.get(key, (None,))[0] is ref:
                del known[key]

        # a view may go while others of the same memory stay: what they all are views of does not
        entry.out = weakref.ref(out._base if out._is_view() else out, forget)
        known[storage] = (entry.out, entry)
        for key in stands:
            self.stands_on(entry, key)
        for t in entry.reads.tensors:
            self.stands_on(entry, storage_of(t))

    def stands_on(self, entry: Entry, storage: int | None) -> None:
        """Ask an entry before this memory changes."""
        if storage is None:
            return
        if storage in self._stands:
            self._stands[storage].append(weakref.ref(entry))
        else:
            self._stands[storage] = [weakref.ref(entry)]

    def argument(self, a: Any, role: Role | None = None) -> Any:
        """An argument of a noted operation, as backward will want it."""
        if not isinstance(a, Tensor):
            return a
        return self._packed(a, "weight" if roles.is_weight(a) else role)

    def _find(self, t: Tensor) -> Entry | None:
        """The entry of a tensor that is as it was noted."""
        key = storage_of(t)
        ref, entry = self._known.get(key, (None, None))
        if ref is None:
            return None
        alive = ref()
        if alive is None or storage_of(alive) != key or version_of(alive) != entry.version:
            self._known.pop(key, None)
            return None
        return entry

    # -- saving -------------------------------------------------------------------------------
    def pack(self, t: Tensor) -> Any:
        unread.kept(t)
        if type(self.policy) is Policy and unread.first_in_backward() \
                and not self._comes_in_strips(t):
            return self.policy.pack(t)
        return self._packed(t, roles.role_of(t) if self.policy.roles else None)

    def _comes_in_strips(self, t: Tensor) -> bool:
        """Is it what an activation gave, and large? It is not kept whole beside its gradient."""
        entry = self._find(t) if self.lean else None
        return entry is not None and entry.fn in activations.KNOWN \
            and t.numel() > activations.strip(t.device.type)

    def _packed(self, t: Tensor, role: Role | None) -> Any:
        entry = self._find(t) if self.lean else None
        if entry is None or not entry.wanted or not entry.settle(self, role) \
                or entry.approximate and role is None:
            return self.policy.pack(t, role)
        return Note(entry, t)

    @staticmethod
    def unpack(x: Any) -> Tensor:
        return x.open()

    def _hooks(self) -> AbstractContextManager[Any]:
        """Pack and unpack for what runs inside; none where somebody else counts what is saved, and
        under torch.func, whose transforms take no hooks."""
        if _counted() or transformed():
            return nullcontext()
        call, here = current(), self._here
        mine = None if call is None else weakref.ref(call)
        here.pack = self.pack
        unread.watch()

        def unpack(x: Any, call: Call | None = call) -> Tensor:     # holds the call: see core/call
            here.opened = mine
            return self.unpack(x)

        return torch.autograd.graph.saved_tensors_hooks(here.pack, unpack)

    def others(self) -> bool:
        """Does somebody else keep what is saved just now? He may run this again without us, so
        nothing may be saved otherwise than stock functions save it."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is not self._here.pack

    @contextmanager
    def recording(self, always: bool = False) -> Iterator[None]:
        """Watch what runs inside; nested calls join the outermost one. Where no graph is wanted
        nothing is kept, so nothing is watched but functions that others answer.

        always: watch there too (torch's fused layers read past modules where nobody watches)."""
        here = self._here
        if here.depth or not (always or torch.is_grad_enabled() or here.intercept):
            yield
            return
        here.depth += 1
        self.on_start()
        self.policy.start()
        self._prune()
        try:
            with self, self._hooks():
                yield
        finally:
            here.depth -= 1
            here.known.clear()
            self.policy.end()

    @contextmanager
    def answering(self, functions: dict[Any, Callable[..., Any]]) -> Iterator[None]:
        """Inside, in this thread, these functions are answered by others."""
        before = self.intercept
        self.intercept = before | {f: upon(before.get(f), a) for f, a in functions.items()}
        try:
            with self.recording():
                yield
        finally:
            self.intercept = before

    def _prune(self) -> None:
        """Entries whose graphs are gone stand on nothing."""
        here = self._here
        living = {k: [r for r in refs if r() is not None] for k, refs in here.stands.items()}
        here.stands = {k: refs for k, refs in living.items() if refs}

    def __deepcopy__(self, memo: dict) -> Tape:
        new = type(self)(self.lean, copy.deepcopy(self.policy, memo), self.beside, self.level)
        memo[id(self)] = new
        return new

    def __reduce__(self) -> tuple:
        return type(self), (self.lean, self.policy, self.beside, self.level)
