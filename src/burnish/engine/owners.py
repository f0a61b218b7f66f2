"""Which handle a tuned model belongs to."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .tuned import Tuned

#: tuned model -> its handle, without keeping either alive
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tuned]] = weakref.WeakKeyDictionary()


def tuned_of(model: nn.Module) -> Tuned | None:
    """The handle of a tuned model (a trainer's callback is given the model alone)."""
    handle = _OWNERS.get(model)
    tuned = handle() if handle is not None else None
    return tuned if tuned is not None and tuned.gone is None else None


def own(model: nn.Module, tuned: Tuned) -> None:
    """The model is a handle's from now on."""
    _OWNERS[model] = weakref.ref(tuned)


def disown(model: nn.Module) -> None:
    """Its handle is of no more use; one that has taken it up since stays."""
    if tuned_of(model) is None:
        _OWNERS.pop(model, None)
