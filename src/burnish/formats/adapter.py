"""Loading adapter folders (written.py writes them, the layout is in folder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, FormatError
from ..core.reading import reading
from ..core.recipe import Recipe, parse
from ..engine.adapters import file_names
from ..engine.slot import slots
from ..engine.swap import ATTR, provider_of
from ..engine.tune import check_model, join
from ..engine.tuned import DEFAULT, Tuned
from ..engine.undo import Transaction, whole
from . import fingerprint, folder
from .expected import check_sizes
from .placed import put
from .written import base_lines


def load(model: nn.Module | Tuned, path: str | Path, force: bool = False,
         name: str | None = None) -> Tuned:
    """Join a saved adapter folder to its base, in place.

    model: a base; or what has adapters already, ``load(tuned, folder, name="law")``: the folder is
    one more, which comes into use by ``tuned.use("law")``, alone or in a mix, as after
    :meth:`~burnish.Tuned.add`. A folder of several adapters brings all of them. A recipe that holds
    the base in another form (``nf4``) goes where the base stands in that form.
    force: go on although the base differs from the one recorded. name: what a folder's adapter is
    called here; default as it is called there.

    Raises FormatError (missing, truncated, foreign, another base: the first difference is named; a
    recipe that asks for more than the file holds), RecipeError, TargetError, ConfigError for a name
    that is taken, or one name for several adapters.
    """
    with reading(path):
        return _load(model, path, force, name)


def _load(model: nn.Module | Tuned, path: str | Path, force: bool, name: str | None) -> Tuned:
    config, tensors = folder.read_adapter(path)
    adapters: dict[str, Any] = config.get("adapters") or {DEFAULT: config}
    names = _names(adapters, name, path)
    if isinstance(model, Tuned):
        _beside(model, adapters, names, tensors, path, config, force)
        return model
    if not force:
        _check_base(config, model, {}, path)
    tensors = {_renamed(key, names): t for key, t in tensors.items()}
    adapters = {names[n]: entry for n, entry in adapters.items()}
    check_sizes(model, adapters, {n: tuple(t.shape) for n, t in tensors.items()}, str(path))

    def change(undo: Transaction) -> Tuned:
        tuned: Tuned | None = None
        for name, entry in adapters.items():
            if tuned is None:
                tuned = join(model, parse(entry["recipe"]), undo, name=name, filled=True,
                             **_args(entry))
            else:
                tuned.add(name, entry["recipe"], **_args(entry))
        assert tuned is not None
        put(tuned, tensors, str(path), fresh=True)
        tuned.filled = False
        if config.get("active"):
            active = {names.get(n, n): w for n, w in config["active"]}
            one = len(active) == 1 and set(active.values()) == {1.0}
            tuned.use(next(iter(active)) if one else active,
                      train=None if one else names.get(config.get("training")))
        tuned.undo = None
        return tuned

    check_model(model)
    return whole(model, change)


def _args(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"targets": entry.get("targets"), "head": bool(entry.get("head")),
            "seed": entry.get("seed", 0), "settled": entry.get("settled")}


def _names(adapters: Mapping[str, Any], name: str | None, path: str | Path) -> dict[str, str]:
    """Name in the file -> name here."""
    if name is not None and len(adapters) > 1:
        raise ConfigError(f"{path} holds {len(adapters)} adapters, {', '.join(adapters)}, and "
                          f"name={name!r} is one name; load it without, they keep theirs")
    return {n: name or n for n in adapters}


def _check_base(config: Mapping[str, Any], model: nn.Module, taken: Mapping[str, str],
                path: str | Path) -> None:
    recorded = (config["base"].get("fingerprint") or {}).get("tensors", {})
    difference = fingerprint.first_difference(recorded, model, taken) if recorded else None
    if difference:
        raise FormatError(f"{path} was trained on another base: {difference}; "
                          "load(..., force=True) goes on all the same")


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """The name that an adapter's own tensor has here."""
    path, mark, rest = f".{key}".partition(f".{ATTR}.")
    adapter, dot, leaf = rest.partition(".")
    if not mark or adapter not in names:
        return key
    return f"{path}{mark}{names[adapter]}{dot}{leaf}".removeprefix(".")


# -- beside others ---------------------------------------------------------------------------------
def _beside(tuned: Tuned, adapters: Mapping[str, Any], names: Mapping[str, str],
            tensors: Mapping[str, Tensor], path: str | Path, config: Mapping[str, Any],
            force: bool) -> None:
    """One more adapter of a model that is tuned, or several."""
    tuned.check_ready()
    if not force:
        _check_base(config, tuned.model, base_lines(tuned), path)
    here = [p for p in next(iter(tuned.adapters.values())).recipe if "storage" in p.axes()]
    recipes = {n: parse(entry["recipe"]) for n, entry in adapters.items()}
    there = [p for r in recipes.values() for p in r if "storage" in p.axes()]
    if here != there and not force:
        raise FormatError(f"{path} was trained on {_held(there)}, this base is {_held(here)}; "
                          "load(..., force=True) goes on all the same")
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    own = {n: Recipe(p for p in r if p not in there) for n, r in recipes.items()}
    check_sizes(tuned, {n: {**adapters[n], "recipe": r} for n, r in own.items()}, shapes, str(path))

    def change() -> None:
        for name, recipe in own.items():
            tuned.add(names[name], recipe, **_args(adapters[name]))
        _check_starts(tuned, set(names.values()), there, path)
        if not force:
            _check_forms(tuned, tensors, path)
        put(tuned, _known_here(tuned, adapters, names, tensors), str(path), names=names.values())

    tuned.filled = True
    try:
        tuned.change(change)
    finally:
        tuned.filled = False


def _held(storages: list[Any]) -> str:
    return f"held by {' + '.join(map(str, storages))}" if storages else "as the model holds it"


def _check_starts(tuned: Tuned, names: set[str], there: list[Any], path: str | Path) -> None:
    """Where a storage took a start in, the weights it holds are that adapter's alone."""
    for where, _, slot in slots(tuned.model) if there else ():
        for part in slot.parts:
            if part.adapter in names and hasattr(slot.module_of(part), "fold_start"):
                raise FormatError(f"{path}: {_held(there)}, {where} holds less what "
                                  f"{slot.module_of(part).part} starts from, and no other adapter "
                                  "stands on such weights; burnish.load(base, folder) first, and "
                                  "the others beside it")


def _check_forms(tuned: Tuned, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """What storages chose from data is what those of the base chose."""
    live = tuned.model.state_dict(keep_vars=True)
    for key, value in tensors.items():
        if provider_of(key) is not None and not (
                key in live and torch.equal(live[key].to(value.device), value)):
            raise FormatError(f"{path}: the form in which {provider_of(key)[0]} holds its weights "
                              "is not that of this base; load(..., force=True) goes on all the "
                              "same")


def _known_here(tuned: Tuned, adapters: Mapping[str, Any], names: Mapping[str, str],
                tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the names that a file of this handle gives them."""
    out: dict[str, Tensor] = {}
    left = {k: t for k, t in tensors.items() if provider_of(k) is None}
    before: set[str] = set()
    for i, (old, new) in enumerate((n, names[n]) for n in adapters):
        selected = set(tuned.adapters[new].selected)
        for key, written in file_names(tuned, new).items():
            first = key not in before if key in selected else i == 0
            if (value := left.pop(key if first else f"{key}@{old}", None)) is not None:
                out[written] = value
        before |= selected
    return out | {_renamed(k, names): t for k, t in left.items()}
