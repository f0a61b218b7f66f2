"""Tensors that a recipe owns once, for all the places that read them.

Trained ones are parameters, in files once. `Seeded` ones are drawn from a seed on the host in
fp32, so every machine draws the same numbers; they are never in files, unless their values came
from one (:func:`stored`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.site import Site


@dataclass(frozen=True)
class Seeded:
    """A frozen tensor that its seed makes again: U(-1/sqrt(n), 1/sqrt(n)), n its last dimension.

    unit: with a standard deviation of one instead. share: of the entries that are not zero; below
    one they are +1 or -1 before that. follows: does another seed of the adapter draw another?
    """

    follows: ClassVar[bool] = True
    shape: tuple[int, ...]
    unit: bool = False
    share: float = 1.0

    def draw(self, seed: int, name: str) -> Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        t = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        bound = 1 / math.sqrt(self.shape[-1])
        t.uniform_(-bound, bound, generator=g)
        if self.share < 1:                       # the outer parts of the interval
            edge = bound * (1 - self.share)
            t = (t > edge).float() - (t < -edge).float()
        return t.div_(t.std()) if self.unit else t


class Shared(nn.Module):
    """Named tensors of one part of a recipe; terms keep this module and read its attributes, so
    that they follow it across devices. follows: has it drawn any from the adapter's seed?"""

    def __init__(self, tensors: Mapping[str, Tensor | nn.Parameter | Seeded], seed: int = 0):
        super().__init__()
        self.follows = any(isinstance(t, Seeded) and t.follows for t in tensors.values())
        for name, t in tensors.items():
            if isinstance(t, Seeded):
                self.register_buffer(name, t.draw(seed, name), persistent=False)
            elif isinstance(t, nn.Parameter):
                self.register_parameter(name, t)
            else:
                self.register_buffer(name, t)


def stored(tensors: Mapping[str, Seeded]) -> dict[str, Tensor]:
    """Room for the same tensors, whose values a file brings and our files keep."""
    return {name: torch.zeros(t.shape) for name, t in tensors.items()}


def check_stored(site: Site, method: str) -> None:
    """RecipeError where nothing has brought the values of :func:`stored`."""
    if not site.blank:
        raise RecipeError(f"{method}(bases='stored') has the bases of a saved adapter; a new one "
                          "draws its own")
