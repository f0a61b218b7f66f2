"""Blocks of a model that are run again: a deeper model of the same weights.

Each run is a module of its own whose parameters are those of the block it repeats, so that an
adapter learns something else at each (`Anatomy.again`), and the weights are held once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.anatomy import Anatomy
from ..core.depth import deepened
from ..core.errors import ConfigError
from ..core.reading import shown
from .swap import ATTR

#: where a list of blocks says which runs it is made of
_SAID = "burnish_repeats"
Spans = tuple[tuple[int, int], ...]


def repeat_blocks(model: nn.Module, spans: Sequence[Sequence[int]]) -> nn.Module:
    """Let `model` run some of its blocks again, in place, and return it.

    spans: runs of blocks, first and one behind the last, in the order in which they run:
    ``[(0, 4), (2, 5)]`` makes blocks 0 1 2 3 2 3 4. Repeated blocks share their parameters, so the
    weights take no more memory; an adapter has its own tensors at each. What is added to a block
    that runs twice cannot be merged, and a storage leaves weights that are read twice as they are.
    The number of blocks in ``model.config`` follows, and so do the places of blocks in a key-value
    cache.

    Raises ConfigError for spans that name no blocks, for a model that is tuned or repeated already,
    and for one whose blocks are not one list.
    """
    repeat(model, spans)
    return model


def repeated(model: nn.Module) -> Spans | None:
    """The spans that a model was made of, or None."""
    return next((getattr(m, _SAID) for m in model.modules() if hasattr(m, _SAID)), None)


def repeat(model: nn.Module, spans: Any) -> Callable[[], None]:
    """The same; what takes it back."""
    if ATTR in model._modules or repeated(model):
        raise ConfigError("blocks are repeated of a model as it was loaded; this one is tuned, or "
                          "its blocks are repeated, already")
    stacks = list(Anatomy.of(model).stacks())
    found = model.get_submodule(stacks[0]) if len(stacks) == 1 else None
    if not isinstance(found, nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no one list of blocks, some of which could "
                          "be run again")
    wanted = checked(spans, len(found))
    made = nn.ModuleList(_again(found[i]) for a, b in wanted for i in range(a, b))
    setattr(made, _SAID, wanted)
    return deepened(model, stacks[0], made, [i for a, b in wanted for i in range(a, b)])


def checked(spans: Any, blocks: int | None = None) -> Spans:
    """Raises ConfigError for what are no runs of so many blocks."""
    most = blocks if blocks is not None else float("inf")
    if not isinstance(spans, list | tuple) or not spans or not all(
            isinstance(s, list | tuple) and len(s) == 2 and all(type(i) is int for i in s)
            and 0 <= s[0] < s[1] <= most for s in spans):
        raise ConfigError(f"runs of blocks are pairs of numbers, the first and one behind the last"
                          f"{'' if blocks is None else f', from 0 to {blocks}'}, as in "
                          f"[(0, 4), (2, 5)]; got {shown(spans)}")
    return tuple((a, b) for a, b in spans)


def _again(block: nn.Module) -> nn.Module:
    """A copy of its modules with the same tensors, and the same configuration."""
    same = [*block.parameters(), *block.buffers(),
            *(c for m in block.modules() if (c := vars(m).get("config")) is not None)]
    return copy.deepcopy(block, {id(t): t for t in same})
