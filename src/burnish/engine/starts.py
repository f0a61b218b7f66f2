"""Starts that a storage has absorbed: a provider then holds W less what some terms begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.call import call_of
from ..core.followed import compiling

if TYPE_CHECKING:
    from .slot import Slot


def with_starts(slot: Slot, value: Tensor, param: str, active: Any = None) -> Tensor:
    """What a provider holds is right while its terms are active whole; what they do not bring
    back now (another adapter is, a part of them, nothing) is added here. active: what is, instead
    of what answers just now."""
    if active is None:
        call = None if compiling() else call_of(slot.state)
        call = slot.state if call is None else call
        active = {} if call.off else dict(call.active)
    for part in slot.absorbed:
        share = 1 - active.get(part.adapter, 0.0)
        if part.place.param == param and share:
            value, place = value.clone(), part.place
            view = place.view(value)
            view.add_(slot.module_of(part).start().to(view.dtype), alpha=share)
            value = value if place.rows else place.unview(view, value)
    return value
