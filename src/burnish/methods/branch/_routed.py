"""Dividing the inner channels of an MLP among experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ...blocks.state.routed import Routed
from ...core.errors import RecipeError

if TYPE_CHECKING:
    from ...core.groups import Group
    from ...core.method import Method
    from ...core.protocols import Attacher
    from ...core.site import Place


def divide(attacher: Attacher, part: Method, group: Group, experts: int,
           made: Callable[[Any, Place, bool], Routed]) -> None:
    """Let ``made(slot, place, does it run first?)`` answer for the linears of an MLP. RecipeError
    where channels are no equal runs, or more than low-rank updates stand there."""
    if group.units % experts:
        raise RecipeError(f"{part.name}(experts={experts}) does not divide the {group.units} inner "
                          f"channels of {group.path}")
    for n, place in enumerate([p for p, _ in group.rows] + [group.out]):
        slot = attacher.slot(place.path)
        listener = made(slot, place, not n)
        listener.listen(slot, part.name)
        slot.pairs(attacher.model.get_submodule(place.path), ((attacher.adapter.name, 1.0),),
                   part.name, listener.whole)


def router(attacher: Attacher, place: Place, experts: int) -> nn.Linear:
    """A linear that tells experts apart by what this place reads."""
    return nn.Linear(place.inp, experts).to(attacher.device(place.path))
