"""Kept tensors that wait elsewhere until backward: in host memory, or on disk.

What is kept is gathered by scope: a block of the model, or a tensor where no block has begun.

    forward    scope n begins:  n - 1 sets out (threads write it), and leaves memory as n fills it,
                                a quarter of it later
               the last scope never sets out: its backward is next
    backward   scope n is asked for:  n - 1 is read back meanwhile, n + 1 is let go of

So the last scope and a part of the one before stand in memory, and tensors leave at moments that no
thread decides: a simulation sees the same. What is asked for before it has left is taken from
memory, and a write that has not begun by then never does.

Each storage moves once however many readers it has; identity is a weak reference to the storage,
never an address (addresses are reused). Small tensors stay where they are, and so does what is kept
while backward runs a block again. Bytes come back as they went, so gradients are bit-equal. A
tensor that is about to change in place sets out before it does; one that has changed unseen while
it stood in memory raises, as in stock torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable

from . import spool
from .functions import backward_runs, storage_of, version_of
from .notes import Kept, View
from .roles import Role
from .saved import Policy
from .spool import Spool

#: bytes below which moving costs more than it saves
THRESHOLD = 1 << 20
#: share of a scope that may be on its way while the next one fills memory
LAG = 0.25
#: forwards whose times say what a disk can take: the first warms up
PROFILED = (2, 3)


class _Away:
    """One storage's bytes: in memory, on their way, or elsewhere."""

    def __init__(self, t: Tensor, scope: _Scope, file: Spool | None):
        self.scope, self.file = scope, file
        self.device, self.nbytes = t.device, t.untyped_storage().nbytes()
        self.kept: Kept | None = Kept(t)             # in memory, as it was
        self.host: Tensor | None = None              # in host memory
        self.at: int | None = None                   # in the file
        self.job: Future[None] | None = None         # on its way there
        self.near: Tensor | None = None              # read back before it was asked for
        self.coming: Future[None] | None = None
        self.back: Any = lambda: None                # the storage readers share

    def leave(self) -> int:
        """Set out; how many bytes did. Those of an accelerator go through host memory."""
        if self.kept is None or not self.kept.intact or self.at is not None:
            return 0
        if isinstance(self.kept.tensor, FakeTensor):         # a simulation has no bytes to move
            self.at = 0
            self.kept = self.kept if self.device.type == "cpu" else None
            return self.nbytes
        flat = _flat(self.kept.tensor.untyped_storage(), self.device)
        if self.file is None:
            self.host = torch.empty(self.nbytes, dtype=torch.uint8,
                                    pin_memory=self.device.type == "cuda")
            self.host.copy_(flat)
            self.kept = None
            return self.nbytes
        self.at = self.file.reserve(self.nbytes)
        self.job = self.file.write(self.at, memoryview(flat.cpu().numpy()))
        weakref.finalize(self, _give_back, self.file, self.at, self.nbytes, self.job).atexit = False
        self.kept = self.kept if self.device.type == "cpu" else None
        return self.nbytes

    def gone(self) -> None:
        """Leave memory, once the bytes have arrived."""
        if self.at is None or self.kept is not None and not self.kept.intact:
            return                                   # changed meanwhile: whoever asks is told
        self._arrived()
        self.kept = None

    def _arrived(self) -> None:
        if self.job is not None and self.file is not None:
            self.file.done(self.job)
        self.job = None

    def fetch(self) -> None:
        """Come back before somebody asks."""
        if self.kept is None and self.near is None and self.back() is None and self.host is None:
            self.near, self.coming = self._read()

    def bring(self) -> Tensor:
        """The bytes as a flat tensor; views of it hold the storage, so that is what is shared."""
        storage = self.back()
        if storage is not None:
            return _flat(storage, self.device)
        if self.kept is not None:
            if self.job is not None and self.job.cancel():
                self.job = self.at = None            # it may set out again
            return _flat(self.kept.open().untyped_storage(), self.device)
        if self.host is not None:
            now = self.host.to(self.device, copy=True)
        else:
            now, coming = (self.near, self.coming) if self.near is not None else self._read()
            if coming is not None and self.file is not None:
                self.file.done(coming)
            now = now.to(self.device)
        self.back = weakref.ref(now.untyped_storage())
        return now

    def _read(self) -> tuple[Tensor, Future[None] | None]:
        now = torch.empty(self.nbytes, dtype=torch.uint8)
        if isinstance(now, FakeTensor) or self.file is None or self.at is None:
            return now, None
        self._arrived()
        return now, self.file.read(self.at, memoryview(now.numpy()))

    def forget(self) -> None:
        """What was read back is let go of; its readers share it while they hold it."""
        self.near = self.coming = None


def _flat(storage: Any, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _give_back(file: Spool, at: int, nbytes: int, job: Future[None]) -> None:
    job.cancel()
    job.add_done_callback(lambda _: file.give_back(at, nbytes))


class _Moved:
    """A view of a storage that is away."""

    def __init__(self, policy: Offload, away: _Away, t: Tensor):
        self.policy, self.away, self.view = policy, away, View(t)

    def open(self) -> Tensor:
        self.policy.reached(self.away.scope)
        return self.view.of(self.away.bring())


class _Scope:
    """What one block keeps. before: the scope that ran before it, weakly. began: on a clock that
    stands while a write is waited for."""

    def __init__(self, before: _Scope | None, number: int, began: float):
        self.number, self.began, self.nbytes = number, began, 0
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.held: list[tuple[Any, int]] = []        # (weak reference to what waits, bytes)
        self.gone = self.left = 0                    # how many have left memory, their bytes

    def add(self, away: _Away) -> None:
        self.held.append((weakref.ref(away), away.nbytes))
        self.nbytes += away.nbytes

    def waiting(self) -> list[_Away]:
        return [a for ref, _ in self.held if (a := ref()) is not None]

    def leaves(self, room: float) -> None:
        """As much leaves memory as `room` bytes hold, in the order it came."""
        for ref, nbytes in self.held[self.gone:]:
            if self.left + nbytes > room:
                return
            self.gone, self.left = self.gone + 1, self.left + nbytes
            if (away := ref()) is not None:
                away.gone()


class _Here(threading.local):
    """The forward under way in this thread, and the backward."""

    def __init__(self) -> None:
        self.scopes: list[_Scope] = []               # this forward's
        self.block = self.fresh = False              # has a block begun; just now
        self.waited = 0.0                            # seconds, for writes
        self.away: dict[int, tuple[Any, Any, int]] = {}       # what went when it was like that
        self.asked: Any = lambda: None               # the scope backward is in
        self.near: list[_Scope] = []                 # scopes that were read back


class Offload(Policy):
    """to="host": beside an accelerator, its memory for the host's. to="disk": a file.

    On a machine without an accelerator "host" moves nothing that is not already there, so only
    "disk" frees memory. in_time: after the third forward, only what the disk can take in the time
    of a step (:func:`kept_from`).
    """

    moves = True
    beside = "what is kept for backward waits elsewhere (offload)"

    def __init__(self, to: Literal["host", "disk"] = "host", threshold: int = THRESHOLD,
                 folder: str | None = None, in_time: bool = False):
        self.to, self.threshold, self.folder, self.in_time = to, threshold, folder, in_time
        self.file = Spool(folder) if to == "disk" else None
        self.profile = Profile(self.file) if in_time else None
        self._here = _Here()
        self.bytes_written = 0

    def __reduce__(self) -> tuple:
        return type(self), (self.to, self.threshold, self.folder, self.in_time)

    def start(self) -> None:
        if backward_runs():
            return
        here = self._here
        here.scopes, here.block, here.fresh = [], False, False
        here.away.clear()

    def end(self) -> None:
        if self.profile is not None and not backward_runs() and self._here.scopes:
            self.profile.forward(self._here.scopes, spool.clock() - self._here.waited)

    def enter(self) -> None:
        """A block of the model begins, whose kept tensors belong together."""
        if not backward_runs():
            self._here.block = self._here.fresh = True

    def pack(self, t: Tensor, role: Role | None = None) -> Any:
        if storage_of(t) is None or backward_runs():
            return super().pack(t)
        storage = t.untyped_storage()
        owner = t._base if t._is_view() else t          # weights are also kept as transposes
        if isinstance(owner, torch.nn.Parameter) or storage.nbytes() < self.threshold \
                or (self.to == "host" and t.device.type == "cpu") \
                or self.in_time and isinstance(t, FakeTensor):       # as much as it may keep
            return super().pack(t)
        key, here = storage._cdata, self._here
        ref, gone, version = here.away.get(key, (lambda: None, lambda: None, None))
        away = gone()                            # alive while some reader waits for it
        if ref() is None or away is None or version != version_of(t):
            scope = self._scope()
            away = _Away(t, scope, self.file)
            scope.add(away)
            for before in here.scopes[-2:-1]:
                self._leaves(before, scope.nbytes - LAG * before.nbytes)
            here.away[key] = (weakref.ref(storage), weakref.ref(away), version_of(t))
        return _Moved(self, away, t)

    def _scope(self) -> _Scope:
        """Where what is kept now belongs. A new scope sends the one before it on its way."""
        here = self._here
        if here.scopes and here.block and not here.fresh:
            return here.scopes[-1]
        here.fresh = False
        for scope in here.scopes[-2:-1]:
            self._leaves(scope, scope.nbytes)
        for scope in here.scopes[-1:]:
            if self.profile is None or self.profile.takes(scope.number):
                for away in scope.waiting():
                    self.bytes_written += away.leave()
        before = here.scopes[-1] if here.scopes else None
        here.scopes.append(_Scope(before, len(here.scopes), spool.clock() - here.waited))
        return here.scopes[-1]

    def _leaves(self, scope: _Scope, room: float) -> None:
        began = spool.clock()
        scope.leaves(room)
        self._here.waited += spool.clock() - began

    def changing(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            _, gone, version = self._here.away.get(storage_of(t) or 0, (None, lambda: None, None))
            away = gone()
            if away is not None and version == version_of(t):
                self.bytes_written += away.leave()
                away.gone()

    def reached(self, scope: _Scope) -> None:
        """Backward asks for something of a scope: the one before it comes back meanwhile."""
        here = self._here
        if here.asked() is scope or not backward_runs():
            return
        if not here.near:
            Variable._execution_engine.queue_callback(self._over)
        before = scope.before()
        for other in here.near:
            if other is not scope and other is not before:
                _forget(other)
        here.asked, here.near = weakref.ref(scope), [scope]
        if before is not None:
            here.near.append(before)
            for away in before.waiting():
                away.fetch()

    def _over(self) -> None:
        here = self._here
        for scope in here.near:
            _forget(scope)
        here.asked, here.near = (lambda: None), []


def _forget(scope: _Scope) -> None:
    for away in scope.waiting():
        away.forget()


class Profile:
    """What a disk took in the profiled forwards, and which scopes it is given from then on."""

    def __init__(self, file: Spool | None):
        self.file, self.forwards, self.first_kept = file, 0, None
        self._runs: list[tuple[list[int], list[float]]] = []
        self._before = (0, 0.0)

    def takes(self, number: int) -> bool:
        """Is the scope of this number written?"""
        return self.first_kept is None or number < self.first_kept

    def forward(self, scopes: Sequence[_Scope], now: float) -> None:
        """A forward is over."""
        self.forwards += 1
        if self.file is None or self.forwards > PROFILED[-1]:
            return
        if self.forwards in PROFILED:
            began = [s.began for s in scopes] + [now]
            self._runs.append(([s.nbytes for s in scopes],
                               [b - a for a, b in zip(began, began[1:], strict=False)]))
        if self.forwards == PROFILED[0] - 1:
            self._before = self.file.written, self.file.busy
        if self.forwards == PROFILED[-1]:
            written, busy = (now - then for now, then in zip(
                (self.file.written, self.file.busy), self._before, strict=True))
            volumes = self._runs[-1][0]
            times = [sum(t) / len(t) for t in zip(*(r[1] for r in self._runs), strict=False)]
            self.first_kept = kept_from(volumes, times, written / busy if busy else float("inf"))


def kept_from(volumes: Sequence[float], times: Sequence[float], bandwidth: float) -> int | None:
    """The first scope that a disk of `bandwidth` bytes a second cannot take in time; None: none.

    volumes V_n, times t_n of the scopes in the order of a forward that takes T = sum t. Backward
    takes twice as long, so when it needs scope n, ``3 T - 2 sum_{i<n} t_i`` have passed since
    forward began. By then all before n has been written, and n written and read: where

        ``(sum_{i<n} V_i + 2 V_n) / (3 T - 2 sum_{i<n} t_i) > bandwidth``

    it stays in memory, with all behind it.
    """
    total, before, spent = sum(times), 0.0, 0.0
    for n, (volume, time) in enumerate(zip(volumes, times, strict=False)):
        if before + 2 * volume > bandwidth * (3 * total - 2 * spent):
            return n
        before, spent = before + volume, spent + time
    return None
