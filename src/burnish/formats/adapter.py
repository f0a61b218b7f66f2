"""Loading adapter folders (written.py writes them, the layout is in folder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import FormatError
from ..core.processes import assign
from ..core.reading import reading
from ..core.recipe import parse
from ..engine.adapters import Adapter, file_names
from ..engine.refold import original, refold
from ..engine.resize import follow
from ..engine.slot import slots
from ..engine.swap import ATTR, provider_of
from ..engine.tune import check_model, join
from ..engine.tuned import DEFAULT, Tuned
from ..engine.undo import Transaction, whole
from . import fingerprint, folder
from .expected import check_sizes


def load(model: nn.Module, path: str | Path, force: bool = False) -> Tuned:
    """Join a saved adapter folder to its base, in place.

    force: go on although the base differs from the one recorded. Raises FormatError (missing,
    truncated, foreign, another base: the first difference is named; a recipe that asks for more
    than the file holds), RecipeError, TargetError.
    """
    with reading(path):
        return _load(model, path, force)


def _load(model: nn.Module, path: str | Path, force: bool) -> Tuned:
    config, tensors = folder.read_adapter(path)
    if not force:
        recorded = (config["base"].get("fingerprint") or {}).get("tensors", {})
        difference = fingerprint.first_difference(recorded, model) if recorded else None
        if difference:
            raise FormatError(f"{path} was trained on another base: {difference}; "
                              "load(..., force=True) goes on all the same")
    adapters = config.get("adapters") or {DEFAULT: config}
    check_sizes(model, adapters, {n: tuple(t.shape) for n, t in tensors.items()}, str(path))

    def change(undo: Transaction) -> Tuned:
        tuned: Tuned | None = None
        for name, entry in adapters.items():
            args = {"targets": entry.get("targets"), "head": bool(entry.get("head")),
                    "seed": entry.get("seed", 0), "settled": entry.get("settled")}
            if tuned is None:
                tuned = join(model, parse(entry["recipe"]), undo, name=name, filled=True, **args)
            else:
                tuned.add(name, entry["recipe"], **args)
        assert tuned is not None
        put(tuned, tensors, str(path), fresh=True)
        tuned.filled = False
        if config.get("active"):
            active = {n: w for n, w in config["active"]}
            one = len(active) == 1 and set(active.values()) == {1.0}
            tuned.use(next(iter(active)) if one else active,
                      train=None if one else config.get("training"))
        tuned.undo = None
        return tuned

    check_model(model)
    return whole(model, change)


def put(tuned: Tuned, tensors: Mapping[str, Tensor], where: str, fresh: bool = False) -> None:
    """Copy an adapter's tensors into the tuned model, strictly: names and shapes must agree.
    Buffers of the base that `tensors` does not hold take their starting values.

    fresh: what trains stands at the base's values yet.
    """
    follow(tuned, tensors)                           # ranks that changed while training
    want, buffers = places_of(tuned)
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


def places_of(tuned: Tuned) -> tuple[dict[str, Tensor], dict[str, tuple[Adapter, str, Tensor]]]:
    """(tensors that a file of this handle holds, those of buffers that it may hold), by name."""
    want: dict[str, Tensor] = {}
    buffers: dict[str, tuple[Adapter, str, Tensor]] = {}
    live = dict(tuned.buffers.live())
    for name, adapter in tuned.adapters.items():
        written = file_names(tuned, name)
        buffers |= {written[n]: (adapter, n, b) for n, b in live.items()}
        want |= tuned.tensors(name)
    return {n: t for n, t in want.items() if n not in buffers}, buffers
