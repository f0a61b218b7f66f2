"""Taking recipes out of a model: one adapter, or everything."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks.weight.waiting import come_home
from .attach import Attacher
from .slot import slots
from .spread import refuse
from .swap import unprovide, unswap

if TYPE_CHECKING:
    from .tuned import Tuned


def give_back(tuned: Tuned) -> None:
    """Put the base back into the model. Can be done twice."""
    refuse(tuned, "giving back the base")
    for path, module, slot in slots(tuned.model):
        for param, child in list(slot.providers.items()):
            unprovide(module, param, _stored(tuned, path, param, slot._modules[child]))
    with torch.no_grad():
        for path, param in tuned.originals:
            _copy_back(tuned, path, param)
        tuned.buffers.give_back()
    for _, module, _ in slots(tuned.model):
        unswap(module)
    for n, p in tuned.model.named_parameters():
        come_home(p)
        if n in tuned.flags:                     # what came since is somebody else's
            p.requires_grad_(tuned.flags[n])
        vars(p).pop("burnish_decay", None)
        vars(p).pop("burnish_resting", None)


def _stored(tuned: Tuned, path: str, param: str, provider: Any) -> torch.Tensor:
    """The value a provider stands for, where the model is now and in its dtype."""
    if (path, param) not in tuned.originals:
        return provider.weight()
    value = tuned.originals.get(path, param)
    held = next(provider.buffers(), None)
    return value.to(value.device if held is None else held.device,
                    getattr(provider, "dtype", value.dtype))


def _copy_back(tuned: Tuned, path: str, param: str) -> None:
    name = f"{path}.{param}" if path else param
    try:
        p = tuned.model.get_parameter(name)
    except AttributeError:
        p = None
    was = tuned.originals.shape(path, param)
    if p is None or p.shape != was:
        warnings.warn(f"{name} was {tuple(was)} when the model was tuned and is "
                      f"{'gone' if p is None else tuple(p.shape)} now: it stays as it is",
                      stacklevel=5)
        return
    p.copy_(tuned.originals.get(path, param))


def take_out(tuned: Tuned, name: str) -> None:
    """Drop an adapter that is not in use, and what it alone has set in the model."""
    model, state = tuned.model, tuned.state
    gone = tuned.adapters.pop(name)
    for _, _, slot in slots(model):
        slot.drop(name)
    alive = {id(m) for _, _, slot in slots(model) for m in slot.modules()}
    for (path, what), readers in list(state.readers.items()):
        if not readers:
            del state.readers[path, what]
    for path, _, slot in slots(model):
        slot.listeners[:] = [x for x in slot.listeners
                             if not isinstance(x, nn.Module) or id(x) in alive]
        slot.reads &= {r for r in state.readers if r[0] == path}
        slot.mode = None
    fresh = type(state.tape)()
    for word in ("lean", "level", "policy", "beside"):
        setattr(state.tape, word, getattr(fresh, word))
    for other in tuned.adapters.values():        # the modes of those that stay
        Attacher(model, tuned.anatomy, state, other, tuned.undo).modes(other.recipe)
    for key in gone.selected:                    # it has its content again, as all of the base
        tuned.base_lines.pop(key, None)
    for _, module, slot in slots(model):
        if slot.idle:
            unswap(module)
