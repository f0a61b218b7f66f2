"""The base's own buffers that training moves: running statistics, counters, codebooks.

They belong to what an adapter has learned as much as a bias does: a normalisation that ran twenty
steps on other data computes something else. So their starting values wait aside, each adapter has
its own, files hold those that differ from the start, and what gives back the base gives back them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.followed import is_fake
from .originals import IN_MEMORY, Originals
from .swap import ATTR


def movable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of every buffer of the base that a forward may move, once where it is shared.

    Those that a file of the model holds (persistent ones) of 16 bits or more, and counters. Large
    integer buffers (packed weights, tables of indices) do not move.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        if path == ATTR or path.startswith(f"{ATTR}.") or f".{ATTR}." in f"{path}.":
            continue
        for leaf, b in module._buffers.items():
            if b is None or id(b) in seen or leaf in module._non_persistent_buffers_set:
                continue
            seen.add(id(b))
            size = b.numel() * b.element_size()
            if b.is_floating_point() and b.element_size() > 1 or size <= IN_MEMORY:
                yield f"{path}.{leaf}" if path else leaf, b


class Buffers:
    """What the movable buffers of a model were when it was tuned."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.starts = Originals()
        self.take()

    def take(self) -> None:
        """Note the values of buffers that have not been noted."""
        for name, b in movable(self.model):
            path, _, leaf = name.rpartition(".")
            self.starts.put(path, leaf, b)

    def live(self) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer in the model) of those that were noted and still have their shape."""
        for name, b in movable(self.model):
            path, _, leaf = name.rpartition(".")
            if (path, leaf) in self.starts and self.starts.shape(path, leaf) == b.shape:
                yield name, b

    def start(self, name: str) -> Tensor:
        """The value it had, on the host."""
        path, _, leaf = name.rpartition(".")
        return self.starts.get(path, leaf)

    def moved(self) -> dict[str, Tensor]:
        """Those that stand at another value than their start, by name."""
        return {n: b.detach() for n, b in self.live() if differs(b, self.start(n))}

    @torch.no_grad()
    def give_back(self) -> None:
        for name, b in self.live():
            b.copy_(self.start(name))

    def stand(self, name: str, value: Tensor) -> None:
        """Let a buffer have a value: another tensor takes its place where it differs, so that a
        backward pass that is still to come finds the one its forward read."""
        path, _, leaf = name.rpartition(".")
        home = self.model.get_submodule(path)._buffers
        if differs(home[leaf], value.cpu()):
            home[leaf] = value.detach().to(home[leaf].device, home[leaf].dtype, copy=True)


def differs(b: Tensor, start: Tensor) -> bool:
    """Other bits (a value that is no number equals itself)."""
    if is_fake(b):
        return False
    here = b.detach().cpu()
    start = start.to(here.dtype)
    same = here == start
    if here.is_floating_point():
        same |= here.isnan() & start.isnan()
    return not bool(same.all())
