"""Where the base's own values wait while they train, so that detach and unmerge are exact.

Small tensors wait in memory. Large ones wait in a file: keeping a second copy of the model in
memory would defeat the purpose.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..blocks.tape import disk
from ..core.unread import Source

#: bytes of one tensor above which it waits on disk
IN_MEMORY = 1 << 16


class About(NamedTuple):
    """What a kept value is, whatever form it waits in."""

    device: torch.device
    shape: torch.Size
    dtype: torch.dtype


class Originals:
    """(module path, parameter) -> the value it had. Written once, before the first change."""

    def __init__(self) -> None:
        #: None: a file, in a simulation. A source: the file that the model comes from
        self.kept: dict[tuple[str, str], Tensor | Path | Source | None] = {}
        self.about: dict[tuple[str, str], About] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._serial = itertools.count()

    def put(self, path: str, param: str, value: Tensor, source: Source | None = None) -> None:
        """source: where the value can be read again, so that nothing has to be kept of it."""
        key = (path, param)
        if key in self.kept:
            return
        self.about[key] = About(value.device, value.shape, value.dtype)
        value = value.detach()
        if value.device.type == "meta":
            self.kept[key] = value                   # no bytes to keep
        elif isinstance(value, FakeTensor) and _large(value):
            self.kept[key] = None
        elif source is not None and _large(value):
            self.kept[key] = source
        elif not _large(value):
            self.kept[key] = value.to("cpu", copy=True)
        else:
            file = self._new_file()
            disk.write(file, value)
            self.kept[key] = file

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="burnish-")
        return Path(self._folder.name) / f"{next(self._serial)}.bin"

    def get(self, path: str, param: str) -> Tensor:
        """The value, on the host; `home` says where it came from."""
        held = self.kept[path, param]
        if isinstance(held, Tensor):
            return held
        _, shape, dtype = self.about[path, param]
        if held is not None and not isinstance(held, Path):
            return held.read().to(dtype)
        return disk.read(held, shape.numel() * dtype.itemsize).view(dtype).view(shape)

    def blank(self, path: str, param: str) -> Tensor:
        """Its shape and dtype, on the meta device."""
        _, shape, dtype = self.about[path, param]
        return torch.empty(shape, dtype=dtype, device="meta")

    def home(self, path: str, param: str) -> torch.device:
        """The device the value came from."""
        return self.about[path, param].device

    def shape(self, path: str, param: str) -> torch.Size:
        return self.about[path, param].shape

    def forget(self, path: str, param: str) -> None:
        """It is back in its place."""
        held = self.kept.pop((path, param))
        if isinstance(held, Path):
            held.unlink(missing_ok=True)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.kept

    def __iter__(self):
        return iter(list(self.kept))

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        """Its own files (links to the same bytes where the disk can), so that either may go."""
        twin = memo[id(self)] = type(self)()
        twin.about = dict(self.about)
        for key, held in self.kept.items():
            if not isinstance(held, Path):
                twin.kept[key] = held            # never written to
                continue
            file = twin._new_file()
            try:
                os.link(held, file)
            except OSError:
                shutil.copyfile(held, file)
            twin.kept[key] = file
        return twin

    def clear(self) -> None:
        self.kept.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _large(t: Tensor) -> bool:
    return t.numel() * t.element_size() > IN_MEMORY
