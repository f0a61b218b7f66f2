"""Where the base's own values wait while they train, so that detach and unmerge are exact.

Small tensors wait in memory. Large ones wait in a file that is mapped on the way back: keeping a
second copy of the model in memory would defeat the purpose.
"""

from __future__ import annotations

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
        self.dtypes: dict[tuple[str, str], tuple[torch.dtype, torch.Size, bool]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, path: str, param: str, value: Tensor) -> None:
        key = (path, param)
        if key in self.kept:
            return
        value = value.detach()
        self.dtypes[key] = (value.dtype, value.shape, value.requires_grad)
        if isinstance(value, FakeTensor) or value.device.type == "meta":
            self.kept[key] = value                   # a simulation has no bytes to keep
        elif value.numel() * value.element_size() <= IN_MEMORY:
            self.kept[key] = value.to("cpu", copy=True)
        else:
            from safetensors.torch import save_file

            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="burnish-")
            file = Path(self._folder.name) / f"{len(self.kept)}.safetensors"
            save_file({"t": value.to("cpu").contiguous()}, file)
            self.kept[key] = file

    def get(self, path: str, param: str) -> Tensor:
        held = self.kept[path, param]
        if isinstance(held, Tensor):
            return held
        from safetensors.torch import load_file

        return load_file(held)["t"]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.kept

    def __iter__(self):
        return iter(list(self.kept))

    def clear(self) -> None:
        self.kept.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
