"""Tensors that a recipe owns once, for all the places that read them.

Trained ones are parameters, in files once. `Seeded` ones are drawn from a seed on the host in
fp32, so every machine draws the same numbers; they are never in files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seeded:
    """A frozen tensor that its seed makes again: U(-1/sqrt(n), 1/sqrt(n)), n its last dimension."""

    shape: tuple[int, ...]

    def draw(self, seed: int, name: str) -> Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        t = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        bound = 1 / math.sqrt(self.shape[-1])
        return t.uniform_(-bound, bound, generator=g)


class Shared(nn.Module):
    """Named tensors of one part of a recipe; terms keep this module and read its attributes, so
    that they follow it across devices."""

    def __init__(self, tensors: Mapping[str, Tensor | nn.Parameter | Seeded], seed: int = 0):
        super().__init__()
        for name, t in tensors.items():
            if isinstance(t, Seeded):
                self.register_buffer(name, t.draw(seed, name), persistent=False)
            elif isinstance(t, nn.Parameter):
                self.register_parameter(name, t)
            else:
                self.register_buffer(name, t)
