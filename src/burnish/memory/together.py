"""What a ledger sees of several processes: shares, storages that come and go, collectives."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.weight.hosted import hosted
from ..blocks.weight.waiting import waiting
from ..core.processes import is_sharded
from .devices import COLLECTIVES
from .operators import leaves

#: the device type of what waits on the host, where the CPU stands for another device
HOST = "host"

#: seconds that gloo's thread is given to let go of a finished collective's tensors: it wakes who
#: waits first, and a busy machine may then leave it standing over several operators
LETTING_GO = 0.005


class Entry:
    """One storage's life. `category` is None until something says what the storage is."""

    __slots__ = ("bytes", "birth", "death", "module", "phase", "category", "device")

    def __init__(self, nbytes: int, birth: int, module: str, phase: str,
                 category: str | None, device: str):
        self.bytes, self.birth = nbytes, birth
        self.death: int | None = None
        self.module, self.phase, self.category, self.device = module, phase, category, device

    def __repr__(self) -> str:
        end = "" if self.death is None else self.death
        return (f"{self.category or '?'} {self.bytes} B [{self.birth}, {end}) "
                f"{self.phase} {self.module or '-'} {self.device}")


class Watch(weakref.ref):
    """A weak reference to a storage that knows its entry."""

    __slots__ = ("key", "entry")
    key: int
    entry: Entry


class Together:
    """A part of :class:`~.ledger.Ledger`.

    together: do several processes train (a group stands)?  shares: is the model in shares
    (DTensors)?  offloads: do they wait on a host for which the CPU stands?
    """

    now: int
    entries: list[Entry]
    _alive: dict[int, Watch]
    _stack: list[str]

    together = False
    shares = False
    offloads = False
    _collective = -2                              # when the last one ran
    _let_go = False                               # may a thread still hold what that one used?

    if TYPE_CHECKING:
        def _lookup(self, t: Tensor) -> Entry | None: ...
        def _phase(self) -> str: ...
        def transient(self, nbytes: int, device: str = "cpu") -> None: ...

    def _begin_together(self, model: nn.Module | None) -> None:
        if model is not None:
            self._hosted(model)
        self.together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.together and model is not None:
            self.shares = self.shares or any(map(is_sharded, model.parameters()))
            self._wait_on_host(model.parameters())
        self._resize = torch.UntypedStorage.resize_
        ledger = self

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            ledger._resize(storage, size)
            ledger._resized(storage)

        torch.UntypedStorage.resize_ = resize_        # type: ignore[method-assign,assignment]

    def _end_together(self) -> None:
        torch.UntypedStorage.resize_ = self._resize   # type: ignore[method-assign]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that is let go and made again, while its tensor stays (FSDP's gathered
        weights). Nothing runs between two operators but this, so growing is an event of its own."""
        watch, size = self._alive.get(storage._cdata), storage.nbytes()
        if watch is None or watch.entry.bytes == size:
            return
        old = watch.entry
        if old.bytes:
            old.death = self.now + 1
        self.now += 1 if size else 0
        watch.entry = Entry(size, self.now, old.module, self._phase(), old.category, old.device)
        if size:
            self.entries.append(watch.entry)

    def _said(self, func: Any, args: tuple) -> None:
        """A collective ran: buckets were made with the wrapper, and what is in them are
        gradients. Or a share left the host, or a sum of gradients went there."""
        packet = func.overloadpacket
        if packet in COLLECTIVES:
            self._collective = self.now
            self._let_go = torch.distributed.get_backend() == "gloo"
            for t in leaves(args[0]):
                entry = self._lookup(t)
                if entry is not None and entry.phase == "load" and not self.shares \
                        and packet.__name__ == "allreduce_":
                    entry.category = "gradients"
                if self.offloads:
                    self.transient(t.nbytes)
        elif self.offloads and packet.__name__ == "all_gather_copy_in":
            self.transient(sum(t.nbytes for t in args[0]))

    def _hosted(self, model: nn.Module) -> None:
        """What waits on a host for which the CPU stands."""
        for part in (*hosted([model]), *waiting([model])):
            if part.away and (entry := self._lookup(part.held)) is not None:
                entry.device = HOST

    def _give_time(self) -> None:
        self._let_go = False
        time.sleep(LETTING_GO)

    def _wait_on_host(self, held: Iterable[Any]) -> None:
        """What belongs to shares is not on the device, where they wait on the host."""
        if self.offloads:
            for part in leaves([t for t in held if is_sharded(t)]):
                if (entry := self._lookup(part)) is not None:
                    entry.device = HOST

    def _gathered(self, module: nn.Module) -> None:
        """Where its weights stand in shares they have just been gathered."""
        for p in module._parameters.values():
            if p is not None and not is_sharded(p):
                entry = self._lookup(p)
                if entry is not None and entry.category is None:
                    entry.category, entry.module = "weights", self._stack[-1]
