"""A file of the states that a run of blocks returned for some samples, whole or not a file.

The states stand block after block, in each sample after sample, raw; behind them a footer says of
each block what its states are and where, with a checksum of every sample's, and ends with a mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC, SUFFIX = b"burnish taps\n\0\0\0", ".taps"
#: most values that a block returns as one tuple
PARTS = 64


@dataclass(frozen=True)
class Form:
    """What a block returned. dtype, shape: of one sample's state. parts: of the tuple around it,
    0 where there is none. note: what else its reader asked about the run."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: int = 0
    note: bool | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def wrap(self, state: Tensor) -> Any:
        return (state, *[None] * (self.parts - 1)) if self.parts else state


@dataclass
class Shard:
    """A whole file: of each block its form, where its states begin, and their checksums."""

    path: Path
    keys: list[str]
    forms: list[Form] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    sums: list[list[int]] = field(default_factory=list)

    def footer(self) -> bytes:
        taps = [{"dtype": str(f.dtype).removeprefix("torch."), "shape": list(f.shape),
                 "parts": f.parts, "note": f.note, "start": at, "sums": sums}
                for f, at, sums in zip(self.forms, self.starts, self.sums, strict=True)]
        text = json.dumps({"keys": self.keys, "taps": taps}).encode()
        return text + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(8, "little") \
            + MAGIC

    @classmethod
    def read(cls, path: Path, blocks: int) -> Shard | None:
        """None where the file is not whole."""
        try:
            with open(path, "rb") as f:
                size, tail = f.seek(0, os.SEEK_END), 12 + len(MAGIC)
                f.seek(max(0, size - tail))
                end = f.read()
                length = int.from_bytes(end[4:12], "little")
                if end[12:] != MAGIC or length > size - tail:
                    return None
                f.seek(size - tail - length)
                text = f.read(length)
            if zlib.crc32(text) != int.from_bytes(end[:4], "little"):
                return None
            told = json.loads(text)
            made = cls(path, [str(k) for k in told["keys"]])
            for t in told["taps"]:
                form = Form(getattr(torch, t["dtype"]), tuple(map(int, t["shape"])),
                            int(t["parts"]), t["note"])
                end_of = t["start"] + form.nbytes * len(made.keys)
                if len(t["sums"]) != len(made.keys) or t["start"] < 0 or min(form.shape) < 1 \
                        or end_of > size - tail - length or not 0 <= form.parts <= PARTS \
                        or form.note not in (None, True, False):
                    return None
                made.forms.append(form)
                made.starts.append(int(t["start"]))
                made.sums.append(t["sums"])
            return made if len(made.forms) == blocks else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def read_into(into: Any, shard: Shard, n: int, wanted: list[tuple[int, int]]) -> bool:
    """Block n's states, each (row of `into`, number in the file); False where one is damaged."""
    size = shard.forms[n].nbytes
    try:
        with open(shard.path, "rb", buffering=0) as f:
            for to, row in wanted:
                f.seek(shard.starts[n] + row * size)
                view = memoryview(into[to])
                if f.readinto(view) != size or zlib.crc32(view) != shard.sums[n][row]:
                    return False
    except OSError:
        return False
    return True


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(data)


def unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
