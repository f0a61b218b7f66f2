"""Bytes that wait on disk: raw files, read back into memory that torch itself makes.

A mapped file or an array of another library would be memory no operator made, which a ledger of
memory can only take for something that was there from the beginning.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def write(file: Path, t: Tensor) -> None:
    """The bytes of `t`, in the order of its elements."""
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with open(file, "wb") as out:
        out.write(memoryview(flat.numpy()))          # no second copy in memory


def read(file: Path | None, nbytes: int, start: int = 0) -> Tensor:
    """(nbytes,) uint8 on the host, from byte `start` of the file. In a simulation the memory comes
    and no bytes do."""
    flat = torch.empty(nbytes, dtype=torch.uint8)
    if file is not None and not isinstance(flat, FakeTensor):
        with open(file, "rb") as source:
            source.seek(start)
            if source.readinto(memoryview(flat.numpy())) != nbytes:
                raise OSError(f"{file} holds less than the {nbytes:,} bytes expected at byte "
                              f"{start:,}")
    return flat
