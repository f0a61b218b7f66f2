"""A model in the place of a deeper one: some of its blocks, and they again where others stood."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.depth import deepened
from ...core.errors import ConfigError


@dataclass(frozen=True)
class Emulator:
    """What an owner hands out.

    model: a model of its own; its weights are copies.  stack: path of its list of blocks.
    clusters: first and last block of each interval of the whole model.  kept: the block that stands
    for each.  trained: numbers in the whole model of those that train.  places: number in the whole
    model of each block of `model`.  alike: CKA of each block and the next.
    """

    model: nn.Module
    stack: str
    clusters: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    trained: tuple[int, ...]
    places: tuple[int, ...]
    alike: tuple[float, ...]

    def path(self, block: int) -> str:
        """In `model`, of a block of the whole one."""
        return f"{self.stack}.{self.places.index(block)}"

    @property
    def targets(self) -> str:
        """The blocks that train, for ``full(targets=...)``."""
        return ",".join(self.path(i) for i in self.trained)

    @property
    def linears(self) -> str:
        """Their linears, for a part that adds to matrices."""
        return ",".join(f"linear@{self.places.index(i)}" for i in self.trained)


def blocks_of(model: nn.Module, stack: str, who: str) -> nn.ModuleList:
    """The list of blocks, all of the same tensors."""
    found = model.get_submodule(stack)
    if not isinstance(found, nn.ModuleList):
        raise ConfigError(f"{who}: the blocks of {type(model).__name__} are no list, in which one "
                          "could stand for another")
    first = _shapes(found[0])
    if odd := next((i for i, b in enumerate(found) if _shapes(b) != first), None):
        raise ConfigError(f"{who}: block {odd} has other tensors than block 0, and could not stand "
                          "for it")
    return found


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in _tensors(block).items()}


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def emulated(model: nn.Module, stack: str, blocks: nn.ModuleList, stands: Mapping[int, int],
             share: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """(a copy in which block ``stands[i]`` stands where block i did; the numbers of its blocks).

    share: it is there as often, with its tensors once; otherwise once. No tensor of a block that is
    left out is ever copied.
    """
    memo: dict[int, Tensor] = {}
    for kept in sorted(set(stands.values())):
        for t in _tensors(blocks[kept]).values():
            copy.deepcopy(t, memo)
    for block, kept in stands.items():
        if block != kept:
            own = _tensors(blocks[kept])
            memo.update((id(t), memo[id(own[n])]) for n, t in _tensors(blocks[block]).items())
    made = copy.deepcopy(model, memo)
    if share:
        return made, tuple(range(len(blocks)))
    places = tuple(sorted(set(stands.values())))
    copies = made.get_submodule(stack)
    assert isinstance(copies, nn.ModuleList)
    deepened(made, stack, nn.ModuleList(copies[i] for i in places), places)
    return made, places


@torch.no_grad()
def plugged(model: nn.Module, emulator: Emulator, back: nn.Module, head: Sequence[str],
            who: str) -> None:
    """Put the trained blocks (and a head) of `back`, an emulator's model, where they belong in
    `model`. Nothing is put where anything else has changed, which has no place there."""
    whole, theirs = model.state_dict(), back.state_dict()
    pairs = dict[str, str]()
    for n in theirs:
        if not n.startswith(f"{emulator.stack}."):
            pairs[n] = n
            continue
        number, _, leaf = n[len(emulator.stack) + 1:].partition(".")
        at = emulator.places[int(number)]
        of = next(k for k, (a, b) in zip(emulator.kept, emulator.clusters, strict=True)
                  if a <= at <= b)
        pairs[n] = f"{emulator.stack}.{of}.{leaf}"
    for n, to in pairs.items():
        if to not in whole or whole[to].shape != theirs[n].shape:
            raise ConfigError(f"{who}: {n} has no place in the whole model; merge what was joined "
                              "to the emulator first (tuned.merge())")
    moves = {n: to for n, to in pairs.items()
             if any(to.startswith(f"{emulator.stack}.{i}.") for i in emulator.trained)
             or any(n.startswith(f"{h}.") for h in head)}
    for n, to in pairs.items():
        if n not in moves and not torch.equal(theirs[n].to(whole[to]), whole[to]):
            raise ConfigError(f"{who}: {n} has been trained and is no block that trains "
                              f"({emulator.targets}): the whole model would not have it")
    for n, to in moves.items():
        whole[to].copy_(theirs[n])
