"""What a storage holds beside starts that it has absorbed, made again where those have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..blocks.weight.provided import Wrap
from ..core.recipe import key_of
from ..core.site import Site
from .originals import Originals
from .slot import Slot, slots
from .undo import Transaction

if TYPE_CHECKING:
    from .adapters import Adapter


@torch.no_grad()
def restart(slot: Slot, module: nn.Module, param: str) -> None:
    """Functions of W that start from its values take those of its new form, with the starts it
    has absorbed."""
    for p in slot.parts:
        wrap = slot.module_of(p)
        if isinstance(wrap, Wrap) and p.place.param == param:
            V = slot._modules[slot.providers[param]].weight()
            V = p.place.view(V)
            for q in slot.absorbed:
                if q.place == p.place:
                    V = V + slot.module_of(q).dense()
            wrap.restart(V)


@torch.no_grad()
def original(slot: Slot, path: str, param: str, originals: Originals) -> Tensor:
    """What a storage was given: the weight as it was, less the starts that it has absorbed."""
    old = slot._modules[slot.providers[param]]
    value = originals.get(path, param).to(next(old.buffers()).device)
    value = value.to(getattr(old, "dtype", value.dtype))
    for p in slot.absorbed:
        if p.place.param == param:
            value = slot.module_of(p).fold_start(value, p.place)
    return value


@torch.no_grad()
def refold(model: nn.Module, adapter: Adapter, undo: Transaction) -> None:
    """Make the weights again that a storage of `adapter` holds without the starts of its terms;
    those have taken other values since (from a file)."""
    for path, module, slot in slots(model):
        for param in {p.place.param for p in slot.absorbed if p.adapter == adapter.name}:
            mine = [p for p in slot.absorbed if p.place.param == param]
            name, key = slot.providers[param], slot.stored_by[param]
            part = next(m for m in adapter.recipe if key_of(adapter.recipe, m) == key)
            moved = original(slot, path, param, adapter.originals)
            place = mine[0].place
            settled = adapter.settled.get(key, {}).get(place.name, {})
            slot._modules[name] = part.storage(Site(place, moved, None, settled))
            restart(slot, module, param)
