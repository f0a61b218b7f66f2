"""An update in few bytes: tensors and a few words for a file, and the stream they come back as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...core.errors import FormatError
from .taskvector import Reader, Task


@dataclass
class Coded:
    """tensors: names below ``payload/`` and ``scale``.  told: words that belong to them."""

    tensors: dict[str, Tensor]
    told: dict[str, str]

    def number(self, key: str) -> int:
        try:
            return int(self.told[key])
        except (KeyError, ValueError):
            raise FormatError(f"the update's file does not say its {key!r} as a number") from None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class Read(Task):
    """A task that comes from a code, tensor by tensor."""

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self.shapes, self.skipped, self.tied = dict(shapes), {}, {}

    def values(self, name: str) -> Tensor:
        """tau of a tensor, flat."""
        raise NotImplementedError

    def reader(self, name: str) -> Reader:
        flat = self.values(name)
        return lambda i, j: flat[i:j].double()


@runtime_checkable
class Codes(Protocol):
    """A part that holds an update in few bytes; its settings are all that decoding needs beside."""

    def encode(self, task: Task) -> Coded:
        """Raises ConfigError for inf or nan."""

    def decode(self, coded: Coded, shapes: Mapping[str, torch.Size]) -> Any:
        """The update again, a :class:`Task` over these tensors in this order. Raises FormatError
        for a code that is not of them."""
