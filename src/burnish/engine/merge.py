"""Folding an update into plain weights, and out again.

Written in fp32 at least and cast back once. What a weight was before waits aside (originals.py; of
updates of a few entries those entries alone, entries.py), so unmerge restores every bit instead of
subtracting what rounding has already changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckError, ConfigError
from .biases import agree
from .drift import Drift
from .entries import Written, plan_of, put_back, write
from .originals import Originals
from .slot import Slot, slots
from .spread import refuse
from .swap import ATTR, refill, unswap

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass
class Undo:
    """What unmerge needs: the swapped classes, the slots, and the weights as they were."""

    modules: list[tuple[str, nn.Module, type, Slot]] = field(default_factory=list)
    written: Originals = field(default_factory=Originals)
    #: (module, name, what waited) of parameters that were None
    made: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    entries: list[Written] = field(default_factory=list)     # of updates that are no more than that
    switched: bool = False                                   # others were put there since
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)   # buffer, its value
    flags: dict[str, bool] = field(default_factory=dict)
    first: list[Callable[[], None]] = field(default_factory=list)   # what was done after the merge
    asked: Callable[[], None] | None = None          # takes back what the configuration asks for
    lost: str | None = None                          # why a folder would be another model


def why_not(tuned: Tuned) -> str | None:
    """The reason the active recipe cannot be merged, or None."""
    if tuned.state.rows is not None or not tuned.state.active:
        return "per-sample adapters have no single weight; use(...) one adapter or a mix first"
    for name, _ in tuned.state.active:
        for m in tuned.adapters[name].recipe:
            if not m.merges:
                return f"{m.name} has no form as a plain weight: it computes on hidden states"
    added = {f"{path}.{place.param}" for path, _, slot in slots(tuned.model)
             for place in (part.place for part in slot.parts) if place is not None}
    for again, first in tuned.anatomy.again.items():
        if not added & {again, first}:                   # nothing is written there
            continue
        return f"{again} is {first} once more, and one weight cannot hold what each run of it adds"
    for path, _, slot in slots(tuned.model):
        if slot.ends is not None:
            return f"{path} reads and gives numbers on a grid, which a plain module does not"
    return None


@torch.no_grad()
def merge(tuned: Tuned) -> nn.Module:
    """See :meth:`burnish.Tuned.merge`."""
    refuse(tuned, "a merge")
    if tuned.merged is not None:
        raise ConfigError("merged already; unmerge() brings the adapters back")
    if (reason := why_not(tuned)) is not None:
        raise CheckError(f"cannot merge: {reason}")
    undo = Undo(flags={n: p.requires_grad for n, p in tuned.model.named_parameters()},
                buffers=[(b, b.detach().clone()) for _, b in tuned.buffers.live()])
    tuned.undo.later(lambda: _take_back(tuned, undo))
    drift = Drift(tuned)
    for path, module, slot in slots(tuned.model):
        few = plan_of(slot, module, tuned.state.active)
        for parameter, place, op in few or ():
            write(undo, parameter, place, op)
        for param, value in _merged(module, slot, tuned.state.active).items() if few is None \
                else ():
            _write(undo, path, module, slot, param, value)
        undo.modules.append((path, module, type(module), slot))
    for _, module, _, _ in undo.modules:
        unswap(module)
    drift.check()
    for p in tuned.model.parameters():
        p.requires_grad_(False)
    if any(leaf == "bias" and shell is None for _, leaf, shell in undo.made):
        try:
            undo.asked = agree(tuned.model)
            tuned.undo.later(undo.asked)
        except CheckError as error:
            undo.lost = str(error)
    tuned.merged = undo
    tuned.state.room.clear()                     # the slots wait, and what they had kept
    return tuned.model


def _merged(module: nn.Module, slot: Slot, active: Any) -> dict[str, Tensor]:
    """parameter -> its value with everything active folded in."""
    out: dict[str, Tensor] = {}
    groups, before, after = slot._planned(module, active)
    for param in slot.providers:
        out[param] = slot._stored(module, param).detach().clone()
    for place, op in groups:
        if all(t.mirrors for t in op.all):       # the module that has the tensor writes it
            continue
        target = out.setdefault(place.param, slot._stored(module, place.param).detach().clone())
        view = place.view(target)
        wide = torch.promote_types(view.dtype, torch.float32)
        value = op.dense(view.to(wide), final=True).to(view.dtype)
        # of a kernel held in another order (channels last) `view` is a copy
        view.copy_(value) if place.rows else target.copy_(place.unview(value, target))
    for part, own, scale in (*before, *after):
        if scale != 1:
            raise CheckError(f"cannot merge: {part.key} is active at {scale}; a scaling folds "
                             "only whole")
        own.fold(module, out)
    return out


def _write(undo: Undo, path: str, module: nn.Module, slot: Slot, param: str, value: Tensor) -> None:
    *parents, leaf = param.split(".")
    for p in parents:
        module = getattr(module, p)
    own = module._parameters.get(leaf)
    if own is not None:
        undo.written.put(path, param, own)
        own.copy_(value)
        return
    shell = slot.shells.get(param)               # a provider held it, or there was no bias
    undo.made.append((module, leaf, shell))
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False) if shell is None else \
        refill(shell, value)


@torch.no_grad()
def _take_back(tuned: Tuned, undo: Undo) -> None:
    """The values as they were before the merge; can be done twice."""
    put_back(undo.entries)
    for path, param in undo.written:
        tuned.model.get_submodule(path).get_parameter(param).copy_(undo.written.get(path, param))
    for module, leaf, shell in undo.made:
        if shell is not None:
            shell.data = shell.data.new_empty(0)
        module._parameters[leaf] = None
    for buffer, value in undo.buffers:
        buffer.copy_(value)


@torch.no_grad()
def unmerge(tuned: Tuned) -> None:
    """See :meth:`burnish.Tuned.unmerge`. Can be done twice."""
    undo = tuned.merged
    if undo is None:
        return
    while undo.first:
        undo.first[-1]()
        undo.first.pop()
    if undo.asked is not None:
        undo.asked()
    _take_back(tuned, undo)
    for _, module, cls, slot in undo.modules:
        module.__class__ = cls
        module._modules[ATTR] = slot
    for n, p in tuned.model.named_parameters():
        p.requires_grad_(undo.flags.get(n, False))
    if undo.switched:
        tuned.adapters.set_trainable()
    undo.written.clear()
    undo.entries.clear()
    tuned.merged = None
