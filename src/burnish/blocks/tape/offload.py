"""Kept tensors that wait elsewhere until backward: in host memory, or on disk.

Each storage moves once however many readers it has; identity is a weak reference to the storage,
never an address (addresses are reused). Small tensors stay where they are. Bytes come back as
they went, so gradients are bit-equal.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import disk
from .functions import storage_of
from .notes import View
from .roles import Role
from .saved import Policy

#: bytes below which moving costs more than it saves
THRESHOLD = 1 << 20


class _Away:
    """One storage's bytes, elsewhere. `bring` gives them back; shared while readers remain."""

    def __init__(self, t: Tensor, place: str, folder: Path | None, serial: int):
        storage = t.untyped_storage()
        self.device, self.nbytes = t.device, storage.nbytes()
        self.file: Path | None = None
        self.held: Tensor | None = None
        self.back: Any = lambda: None
        if isinstance(t, FakeTensor):               # a simulation has no bytes to move
            return
        flat = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
        if place == "disk":
            self.file = folder / f"{serial}.bin"
            disk.write(self.file, flat)
            weakref.finalize(self, self.file.unlink, missing_ok=True)
        else:
            pinned = flat.device.type == "cuda"
            self.held = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)
            self.held.copy_(flat)

    def bring(self) -> Tensor:
        """The bytes as a flat tensor; views of it hold the storage, so that is what is shared."""
        storage = self.back()
        if storage is not None:
            return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        if self.held is not None:
            now = self.held.to(self.device, copy=True)
        else:
            now = disk.read(self.file, self.nbytes).to(self.device)
        self.back = weakref.ref(now.untyped_storage())
        return now


class _Moved:
    """A view of a storage that is away."""

    def __init__(self, away: _Away, t: Tensor):
        self.away, self.view = away, View(t)

    def open(self) -> Tensor:
        return self.view.of(self.away.bring())


def _gone() -> None:
    return None


class Offload(Policy):
    """to="host": beside an accelerator, its memory for the host's. to="disk": a file per storage.

    On a machine without an accelerator "host" moves nothing that is not already there, so only
    "disk" frees memory.
    """

    def __init__(self, to: Literal["host", "disk"] = "host", threshold: int = THRESHOLD,
                 folder: str | None = None):
        self.to, self.threshold, self.folder = to, threshold, folder
        self._folder = tempfile.TemporaryDirectory(prefix="burnish-", dir=folder) \
            if to == "disk" else None
        self._serial = itertools.count()
        self._away: dict[int, tuple[Any, Any, int]] = {}      # what went when it was like that
        self.bytes_written = 0

    def __reduce__(self) -> tuple:
        return type(self), (self.to, self.threshold, self.folder)

    def start(self) -> None:
        self._away.clear()

    def pack(self, t: Tensor, role: Role | None = None) -> Any:
        if storage_of(t) is None:
            return super().pack(t)
        storage = t.untyped_storage()
        nbytes = storage.nbytes()
        owner = t._base if t._is_view() else t          # weights are also kept as transposes
        if isinstance(owner, torch.nn.Parameter) or nbytes < self.threshold \
                or (self.to == "host" and t.device.type == "cpu"):
            return super().pack(t)
        key = storage._cdata
        ref, gone, version = self._away.get(key, (_gone, _gone, None))
        away = gone()                            # alive while some reader waits for it
        if ref() is None or away is None or version != t._version:
            away = _Away(t, self.to, self._folder and Path(self._folder.name),
                         next(self._serial))
            self.bytes_written += nbytes
            self._away[key] = (weakref.ref(storage), weakref.ref(away), t._version)
        return _Moved(away, t)
