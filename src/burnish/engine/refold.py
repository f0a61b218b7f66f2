"""What a storage holds beside starts that it has absorbed, made again where those have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..blocks.weight.provided import Wrap
from ..core.recipe import key_of
from ..core.site import Site
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
def refold(model: nn.Module, adapter: Adapter, undo: Transaction) -> None:
    """Make the weights again that a storage of `adapter` holds without the starts of its terms;
    those have taken other values since (from a file)."""
    for path, module, slot in slots(model):
        for param in {p.place.param for p in slot.absorbed if p.adapter == adapter.name}:
            mine = [p for p in slot.absorbed if p.place.param == param]
            name, old = slot.providers[param], slot._modules[slot.providers[param]]
            key = slot.stored_by[param]
            part = next(m for m in adapter.recipe if key_of(adapter.recipe, m) == key)
            held = next(old.buffers())
            moved = adapter.originals.get(path, param).to(held.device)
            moved = moved.to(getattr(old, "dtype", moved.dtype))
            for p in mine:
                moved = slot.module_of(p).fold_start(moved, p.place)
            place = mine[0].place
            settled = adapter.settled.get(key, {}).get(place.name, {})
            slot._modules[name] = part.storage(Site(place, moved, None, settled))
            restart(slot, module, param)
