"""Where the base's own values wait while they train, so that detach and unmerge are exact.

Small tensors wait in memory. Large ones wait in a file that is mapped on the way back: keeping a
second copy of the model in memory would defeat the purpose.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: bytes of one tensor above which it waits on disk
IN_MEMORY = 1 << 20


class Originals:
    """(module path, parameter) -> the value it had. Written once, before the first change."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], Tensor | Path] = {}
        self.devices: dict[tuple[str, str], torch.device] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._serial = itertools.count()

    def put(self, path: str, param: str, value: Tensor) -> None:
        key = (path, param)
        if key in self.kept:
            return
        value = value.detach()
        self.devices[key] = value.device
        if isinstance(value, FakeTensor) or value.device.type == "meta":
            self.kept[key] = value                   # a simulation has no bytes to keep
        elif value.numel() * value.element_size() <= IN_MEMORY:
            self.kept[key] = value.to("cpu", copy=True)
        else:
            from safetensors.torch import save_file

            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="burnish-")
            file = Path(self._folder.name) / f"{next(self._serial)}.safetensors"
            save_file({"t": value.to("cpu").contiguous()}, file)
            self.kept[key] = file

    def get(self, path: str, param: str) -> Tensor:
        """The value, on the host; `home` says where it came from."""
        held = self.kept[path, param]
        if isinstance(held, Tensor):
            return held
        from safetensors.torch import load_file

        return load_file(held)["t"]

    def home(self, path: str, param: str) -> torch.device:
        """The device the value came from."""
        return self.devices[path, param]

    def forget(self, path: str, param: str) -> None:
        """It is back in its place."""
        held = self.kept.pop((path, param))
        if isinstance(held, Path):
            held.unlink()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.kept

    def __iter__(self):
        return iter(list(self.kept))

    def clear(self) -> None:
        self.kept.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
