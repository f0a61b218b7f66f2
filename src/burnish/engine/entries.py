"""Merged updates of a few entries: written, taken back and exchanged entry by entry.

What an update of k entries overwrites is k numbers. They wait beside the merged model, so that
taking it out restores every bit, and putting another in its place costs both updates' entries and
nothing of the weight's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.tape.functions import storage_of
from ..blocks.weight.provided import Weighted
from ..core.errors import ConfigError
from ..core.site import Place
from .planned import make_plan

if TYPE_CHECKING:
    from .merge import Undo
    from .slot import Slot
    from .tuned import Tuned


@dataclass(frozen=True)
class Written:
    """Entries of one parameter that were overwritten, and what they were."""

    parameter: nn.Parameter
    place: Place
    rows: Tensor
    columns: Tensor
    before: Tensor

    def now(self) -> Tensor:
        return self.place.view(self.parameter.detach())[self.rows, self.columns]

    def put(self, values: Tensor) -> None:
        self.place.view(self.parameter.detach())[self.rows, self.columns] = values

    def put_back(self) -> None:
        self.put(self.before)


def plan_of(slot: Slot, module: nn.Module, active: Any
            ) -> list[tuple[nn.Parameter, Place, Weighted]] | None:
    """The updates of a module where all that is active there are entries of its own parameters;
    None where anything else is."""
    groups, before, after = make_plan(slot, module, active)
    if before or after or slot.providers:
        return None
    out = []
    for place, op in groups:
        *parents, leaf = place.param.split(".")
        owner = module
        for p in parents:
            owner = getattr(owner, p)
        own = owner._parameters.get(leaf)
        if own is None or op.wrap is not None or any(t.entries() is None for t, _ in op.terms):
            return None
        if storage_of(place.view(own)) != storage_of(own):   # a kernel in another order: a copy
            return None
        out.append((own, place, op))
    return out


@torch.no_grad()
def write(undo: Undo, parameter: nn.Parameter, place: Place, op: Weighted) -> None:
    """The sum of the updates at their entries, rounded once as a whole merge would."""
    found = [(t.entries(), s) for t, s in op.terms]
    index = found[0][0][0] if len(found) == 1 else torch.cat([i for (i, _), _ in found]).unique()
    view = place.view(parameter.detach())
    rows, columns = index // view.shape[-1], index % view.shape[-1]
    before = view[rows, columns]
    value = before.to(torch.promote_types(before.dtype, torch.float32))
    value = value.clone() if value is before else value
    for (own, v), s in found:
        value[torch.searchsorted(index, own)] += s * v.to(value.dtype)
    undo.entries.append(Written(parameter, place, rows, columns, before))
    view[rows, columns] = value.to(view.dtype)


def put_back(entries: list[Written]) -> None:
    """The newest first: two updates may have written one entry."""
    for e in reversed(entries):
        e.put_back()


def check_switch(tuned: Tuned, weights: dict[str, float]) -> None:
    """Refuse to exchange adapters in a merged model where that is no matter of entries."""
    undo: Undo = tuned.merged
    why = "only updates of single entries (shira) are exchanged in a merged model; call " \
          "tuned.unmerge() first"
    if undo.first:
        raise ConfigError("the merged model has been shrunk; call tuned.unmerge() first")
    if undo.made or next(iter(undo.written), None) is not None:
        raise ConfigError(f"the update is merged into whole weights; {why}")
    for name in dict.fromkeys((*weights, *(n for n, _ in tuned.state.active))):
        if selected := tuned.adapters[name].selected:
            raise ConfigError(f"{name!r} trains {next(iter(selected))} of the base; {why}")
        if (away := tuned.adapters[name].away) or away is None and tuned.buffers.moved():
            raise ConfigError(f"{name!r} has moved running statistics of the base; {why}")
    for path, module, _, slot in undo.modules:
        if plan_of(slot, module, tuple(weights.items())) is None:
            raise ConfigError(f"{', '.join(weights)}: what is active at {path or 'the root'} is "
                              f"more than entries; {why}")


@torch.no_grad()
def switch(tuned: Tuned, weights: dict[str, float]) -> None:
    """Let the entries of `weights` stand in the merged model in place of those that do."""
    undo: Undo = tuned.merged
    check_switch(tuned, weights)
    old = list(undo.entries)
    stood = [e.now() for e in old]

    def back() -> None:
        put_back(undo.entries)
        undo.entries[:] = old
        put_back(old)
        for e, values in zip(old, stood, strict=True):
            e.put(values)

    tuned.undo.later(back)
    put_back(undo.entries)
    undo.entries.clear()
    for _, module, _, slot in undo.modules:
        for parameter, place, op in plan_of(slot, module, tuple(weights.items())) or ():
            write(undo, parameter, place, op)
    for name, adapter in tuned.adapters.items():     # what trains or moves nothing of the base
        adapter.away = None if weights == {name: 1.0} else adapter.away or {}
    undo.switched = True
