"""How weights lie in modules: runs of rows of a fused matrix, transposes, plain linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..blocks.weight.provided import Weighted
from ..core.site import Place


def segments(groups: list, total: int) -> Iterator[tuple[tuple[int, int], Weighted | None]]:
    """The rows of a fused matrix as runs, tuned and untouched, in order."""
    at = 0
    for place, op in sorted(groups, key=lambda g: g[0].rows[0]):
        a, b = place.rows
        if a > at:
            yield (at, a), None
        yield (a, b), op
        at = b
    if at < total:
        yield (at, total), None


def whole(place: Place) -> Place:
    return replace(place, rows=None)


def is_conv1d(module: nn.Module) -> bool:
    """The Conv1D of GPT-2: a linear that stores its transpose."""
    return hasattr(module, "nf") and type(module).__name__ == "Conv1D"


def is_conv(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """A convolution that runs as torch has it."""
    return any(isinstance(module, c) and forward is c.forward
               for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def no_dropout(module: nn.Module, place: Place, wrapped: bool, generated: bool) -> str | None:
    """Why dropout on the input of an update cannot act here; None where it can.

    wrapped: a function of W stands over the update. generated: it is made entry by entry.
    """
    forward = getattr(type(module), "_burnish_base", type(module)).forward
    if place.param == "weight" and is_linear(module, forward):
        return None
    if place.param == "weight" and is_conv(module, forward):
        if generated:
            return "what is generated is added to the weight of a convolution"
        return "a function of a convolution's weight acts on the weight" if wrapped else None
    if place.kind == "embedding":
        return "rows are looked up, so there is no input to drop"
    if place.kind == "experts":
        return "its module multiplies the weights of all experts by itself"
    return f"{type(module).__name__} takes a weight and no update beside it"


def is_linear(module: nn.Module, forward: Callable[..., Any]) -> bool:
    return (isinstance(module, nn.Linear) and forward is nn.Linear.forward) or is_conv1d(module)
