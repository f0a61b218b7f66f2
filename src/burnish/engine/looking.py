"""What a recipe has put where: read by controllers and objectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..core.site import Place
from .slot import slots
from .swap import ATTR


def terms(model: nn.Module, kind: type, adapter: str) -> Iterator[tuple[str, Any]]:
    """(place name, term) of every term of a class in an adapter."""
    for _, _, slot in slots(model):
        for part in slot.parts:
            if part.adapter == adapter and part.place is not None \
                    and isinstance(term := slot.module_of(part), kind):
                yield part.place.name, term


def branches(model: nn.Module, kind: type, adapter: str) -> Iterator[tuple[str, Any]]:
    """(path, module) of every branch of a class in an adapter."""
    for path, _, slot in slots(model):
        for part in slot.parts:
            if part.adapter == adapter and part.branch is not None \
                    and isinstance(made := slot.module_of(part), kind):
                yield path, made


def weight(model: nn.Module, place: Place) -> Tensor:
    """The (out, in) view of what stands at a place, decoded where a storage holds it."""
    module = model.get_submodule(place.path)
    slot = module._modules.get(ATTR)
    stored = place.stored(module) if slot is None else slot._stored(module, place.param)
    return place.view(stored)
