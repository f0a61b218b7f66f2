"""The tensors of an adapter folder, copied to where they belong in a tuned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..core.errors import FormatError
from ..core.processes import assign
from ..engine.adapters import Adapter, file_names
from ..engine.refold import original, refold
from ..engine.resize import follow
from ..engine.slot import slots
from ..engine.swap import ATTR, provider_of
from ..engine.tuned import Tuned
from . import fingerprint


def put(tuned: Tuned, tensors: Mapping[str, Tensor], where: str, fresh: bool = False,
        names: Iterable[str] | None = None) -> None:
    """Copy adapters' tensors into the tuned model, strictly: names and shapes must agree.
    Buffers of the base that `tensors` does not hold take their starting values.

    fresh: what trains stands at the base's values yet. names: of the adapters that `tensors` holds,
    default all.
    """
    follow(tuned, tensors)                           # ranks that changed while training
    want, buffers = places_of(tuned, names)
    missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - {*want, *buffers})
    if missing or extra:
        side, names = ("lacks", missing) if missing else ("has", extra)
        raise FormatError(f"{where} {side} {names[0]!r} ({len(names)} such tensors): it does not "
                          "belong to this recipe on this model")
    for key, value in tensors.items():
        if value.shape != (shape := (want[key] if key in want else buffers[key][2]).shape):
            raise FormatError(f"{where}: {key} has shape {tuple(value.shape)}, the model expects "
                              f"{tuple(shape)}")
    standing = {k: b for k, (a, _, b) in buffers.items() if a.away is None}
    fingerprint.check_tied({**want, **standing}, tensors, where)
    tuned.change(lambda: _put(tuned, tensors, want, buffers, fresh))


@torch.no_grad()
def _put(tuned: Tuned, tensors: Mapping[str, Tensor], want: Mapping[str, Tensor],
         buffers: Mapping[str, tuple[Adapter, str, Tensor]], fresh: bool) -> None:
    for key, (adapter, name, live) in buffers.items():
        value = tensors.get(key)
        if adapter.away is None:
            tuned.undo.keep(live)
            live.copy_(tuned.buffers.start(name) if value is None else value)
        elif value is None:
            adapter.away.pop(name, None)
        else:
            adapter.away[name] = value.to(live.device, live.dtype, copy=True)
    starts = _starts(tuned)
    for key in starts:
        tuned.undo.keep(want[key])
        want[key].copy_(tensors[key])
    if starts:                                   # storage holds what they leave of the base
        refold(tuned.model, next(iter(tuned.adapters.values())), tuned.undo)
    for key, here in want.items():
        if key in starts:
            continue
        if (of := provider_of(key)) is not None:
            _remake(tuned, of, tensors[key])
        elif key.endswith("._extra_state"):
            module = tuned.model.get_submodule(key.removesuffix("._extra_state"))
            tuned.undo.later(partial(module.set_extra_state, module.get_extra_state()))
            module.set_extra_state(tensors[key])
        else:
            path, _, leaf = key.rpartition(".")
            waits = fresh and (path, leaf) in tuned.originals
            tuned.undo.keep(here, partial(tuned.originals.get, path, leaf) if waits else None)
            assign(here, tensors[key])


def _remake(tuned: Tuned, of: tuple[str, str], said: Tensor) -> None:
    """Let a storage choose what a file says, of the weight as it was."""
    slot = tuned.model.get_submodule(of[0]).burnish
    storage = slot.get_submodule(slot.providers[of[1]])
    now = storage.get_extra_state()
    if torch.equal(now, said.to(now.device)):
        return

    def choose(state: Tensor) -> None:
        storage.remade(original(slot, *of, tuned.originals), state)

    if not tuned.filled:                             # else it goes with all that has just joined
        tuned.undo.later(partial(choose, now))
    choose(said)


def _starts(tuned: Tuned) -> set[str]:
    """Names of the tensors that say what a storage has absorbed."""
    return {f"{path}.{ATTR}.{p.adapter}.{p.key}.{leaf}" if path else
            f"{ATTR}.{p.adapter}.{p.key}.{leaf}"
            for path, _, slot in slots(tuned.model) for p in slot.absorbed
            for leaf, _ in slot.module_of(p).named_buffers()}


def places_of(tuned: Tuned, names: Iterable[str] | None = None
              ) -> tuple[dict[str, Tensor], dict[str, tuple[Adapter, str, Tensor]]]:
    """(tensors that a file of these adapters holds, those of buffers that it may hold), by name."""
    want: dict[str, Tensor] = {}
    buffers: dict[str, tuple[Adapter, str, Tensor]] = {}
    live = dict(tuned.buffers.live())
    for name in tuned.adapters if names is None else names:
        adapter, written = tuned.adapters[name], file_names(tuned, name)
        buffers |= {written[n]: (adapter, n, b) for n, b in live.items()}
        want |= tuned.tensors(name)
    return {n: t for n, t in want.items() if n not in buffers}, buffers
