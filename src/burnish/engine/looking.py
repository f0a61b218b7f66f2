"""What a recipe has put where: read by controllers and objectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..core.site import Place
from .adapters import Adapter, known
from .slot import slots
from .swap import ATTR


class Looking:
    """The part of :class:`~burnish.engine.tuned.Tuned` that hands out terms, branches, weights."""

    model: nn.Module

    @property
    def _active(self) -> Adapter:
        raise NotImplementedError

    def terms(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(place name, term) of every term of a class in an adapter (default: the active one)."""
        self._here()
        name = known(self, name).name if name else self._active.name
        for _, _, slot in slots(self.model):
            for part in slot.parts:
                if part.adapter == name and part.place is not None:
                    term = slot.module_of(part)
                    if isinstance(term, kind):
                        yield part.place.name, term

    def branches(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(path, module) of every branch of a class in an adapter (default: the active one)."""
        self._here()
        name = known(self, name).name if name else self._active.name
        for path, _, slot in slots(self.model):
            for part in slot.parts:
                if part.adapter == name and part.branch is not None \
                        and isinstance(made := slot.module_of(part), kind):
                    yield path, made

    def weight(self, place: Place) -> Tensor:
        """The (out, in) view of what stands at a place, decoded where a storage holds it."""
        module = self.model.get_submodule(place.path)
        slot = module._modules.get(ATTR)
        stored = place.stored(module) if slot is None else slot._stored(module, place.param)
        return place.view(stored)
