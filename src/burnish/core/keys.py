"""Keys of the batch that a method reads beside what the model takes: what each means, and may be.

A method names them once (`Method.context`); the call checks them, the suite and the simulation
make examples of them, and `fit` finds them among the columns of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import RecipeError

if TYPE_CHECKING:
    from .method import Method


@dataclass(frozen=True)
class Key:
    """One key: whole numbers from 0, one entry per sample (or one for all of them).

    meaning: in a few words, for errors and help.
    below: the numbers are smaller than this; a name is the method's setting that says so.
    shape: of one sample's entry, where it is more than a number.
    training: it is read by what is minimised alone, so evaluation does without it.
    optional: any batch may do without it; no example of it is made.
    real: any numbers from 0 to 1 instead of whole ones; `below` says nothing then.
    """

    meaning: str
    below: int | str = 2
    shape: tuple[int, ...] = ()
    training: bool = False
    optional: bool = False
    real: bool = False


@dataclass(frozen=True)
class Read:
    """A key as one part of a recipe reads it. below: the number itself."""

    part: str
    key: Key
    below: int

    @property
    def range(self) -> str:
        """Which numbers its entries may be, in words."""
        return "from 0 to 1" if self.key.real else f"from 0 to {self.below - 1}"

    def takes(self, number: float) -> bool:
        """Is this number an entry?"""
        if self.key.real:
            return 0 <= number <= 1
        return float(number).is_integer() and 0 <= number < self.below

    def check(self, name: str, value: Any) -> None:
        """Raises RecipeError for entries that are not the numbers that they may be. What lies on a
        device is taken as it is: looking would wait for it."""
        if self.key.real:
            self._real(name, value)
            return
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.device.type != "cpu" or not value.numel():
                return
            whole = not value.is_floating_point() and not value.is_complex()
            low, high = (int(value.min()), int(value.max())) if whole else (0, 0)
        else:
            entries = list(value) if isinstance(value, list | tuple) else [value]
            whole = all(isinstance(v, int) for v in entries)
            low, high = (min(entries), max(entries)) if whole and entries else (0, 0)
        if not whole or low < 0 or high >= self.below:
            bad = repr(value) if not whole and not isinstance(value, Tensor) else \
                f"{value.dtype} numbers" if not whole else str(low if low < 0 else high)
            raise RecipeError(f"{self.part} reads {name!r} of the batch ({self.key.meaning}): "
                              f"whole numbers {self.range}, not {bad}")

    def _real(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and (
                type(value) is not Tensor or value.device.type != "cpu" or not value.numel()):
            return
        try:
            entries = torch.as_tensor(value, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError):
            entries = torch.tensor([math.nan])
        out = entries[~((entries >= 0) & (entries <= 1))]
        if len(out):
            bad = repr(value) if not isinstance(value, Tensor) and bool(out.isnan().any()) else \
                str(float(out[0]))
            raise RecipeError(f"{self.part} reads {name!r} of the batch ({self.key.meaning}): "
                              f"numbers {self.range}, not {bad}")


def keys_of(parts: Iterable[Method]) -> dict[str, Read]:
    """name -> how it is read, over all parts; where several read one, the narrowest range."""
    found: dict[str, Read] = {}
    for part in parts:
        for name, key in part.keys().items():
            below = getattr(part, key.below) if isinstance(key.below, str) else key.below
            if name not in found or below < found[name].below:
                found[name] = Read(part.name, key, below)
    return found


def examples(parts: Iterable[Method], samples: int) -> dict[str, Tensor]:
    """Entries for every declared key that is not optional: 0, 1, 2, ... over the samples, within
    the range, or (of real ones) 1/4, 3/4, 1/4, ..."""
    out = {}
    for name, read in keys_of(parts).items():
        if read.key.optional:
            continue
        count = torch.arange(samples * torch.Size(read.key.shape).numel())
        entries = (count % 2) / 2 + 0.25 if read.key.real else count % read.below
        out[name] = entries.view(samples, *read.key.shape)
    return out


def model_batch(batch: Any, keys: Iterable[str]) -> Any:
    """The batch without the declared keys: what the untouched model is called with."""
    if not isinstance(batch, Mapping):
        return batch
    left = set(keys)
    return {k: v for k, v in batch.items() if k not in left}
