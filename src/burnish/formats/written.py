"""Saving a tuned model as an adapter folder (the layout is in folder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..core.outputs import base_class
from ..core.processes import first, gathered, wait
from ..core.recipe import Recipe
from ..engine.swap import ATTR
from . import fingerprint, folder, safe

if TYPE_CHECKING:
    from ..engine.tuned import Tuned


def save(tuned: Tuned, path: Path, run: Mapping[str, Any] | None = None,
         card: str | Literal[False] | None = None, base: str | None = None, whole: bool = False
         ) -> Path:
    """Write every adapter of `tuned`. base: name or folder of the base; default what the model
    says of itself (``name_or_path``). whole: what serves training alone too.

    Of a sharded model every process asks, since all give their parts; the first one writes.
    """
    tensors = contents(tuned, whole)
    if tuned.state.shards is not None and not first():
        wait()
        return path
    recipe = _recipe(tuned.recipe, whole)
    config = {
        "recipe": str(recipe),
        "parts": [{"method": m.name, **m.settings()} for m in recipe],
        "base": {"name": base or _name_of(tuned.model),
                 "fingerprint": _fingerprint(tuned).to_json()},
        "targets": tuned.active.targets,
        "head": tuned.active.head,
        "seed": tuned.active.seed,
        "selected": sorted(tuned.active.selected),
        "active": [list(a) for a in tuned.state.active] or None,
        "training": tuned.training,
        "adapters": {n: {"recipe": str(_recipe(a.recipe, whole)), "targets": a.targets,
                         "head": a.head, "seed": a.seed, "settled": a.settled}
                     for n, a in tuned.adapters.items()},
    }
    made = folder.write_adapter(path, tensors, config, card=card, run=run)
    if tuned.state.shards is not None:
        wait()
    return made


def rehearse(tuned: Tuned) -> None:
    """Everything that :func:`save` makes in memory, and no file."""
    _fingerprint(tuned)
    tensors = contents(tuned)
    all(map(folder.finite, tensors.values()))
    safe.laid_out(tensors)


def contents(tuned: Tuned, whole: bool = False) -> dict[str, Tensor]:
    """The tensors of a file by name; unless `whole`, of what answers alone. Those of which each
    process holds a part are gathered, so that every process has to ask."""
    tensors: dict[str, Tensor] = {}
    for name in tuned.adapters:
        tensors |= {k: gathered(t) for k, t in tuned.tensors(name).items()}
    for path, module in () if whole else tuned.model.named_modules():
        if f".{ATTR}." in f".{path}" and hasattr(module, "finished"):
            tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{path}.")}
            tensors |= {f"{path}.{leaf}": gathered(t) for leaf, t in module.finished().items()}
    return tensors


def _recipe(recipe: Recipe, whole: bool) -> Recipe:
    return recipe if whole else Recipe(m.finished() for m in recipe)


def read_base(tuned: Tuned) -> None:
    """Read the base's lines now, for files to come: its weights are about to be sharded."""
    if first():
        trained = {n for a in tuned.adapters.values() for n in a.selected}
        tuned.base_lines |= fingerprint.lines(tuned.model, trained, tuned.base_lines)


def base_lines(tuned: Tuned) -> dict[str, str]:
    """What a file says of the base, tensor by tensor."""
    return dict(_fingerprint(tuned).tensors)


def _fingerprint(tuned: Tuned) -> fingerprint.Fingerprint:
    """Of the base as it was before anything trained; tensors that wait aside are read there."""
    trained = {n for a in tuned.adapters.values() for n in a.selected}
    taken = tuned.base_lines                     # an original does not change: read it once
    for path, param in tuned.originals:
        name = f"{path}.{param}" if path else param
        if name not in taken:
            if name in trained:                  # its content does not count: it is not read
                taken[name] = fingerprint.line(tuned.originals.blank(path, param))
            else:
                taken[name] = fingerprint.line(tuned.originals.get(path, param))
    return fingerprint.fingerprint(tuned.model, taken, whole=trained)


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "") or getattr(
        getattr(model, "config", None), "_name_or_path", "")
    return name or base_class(model).__name__

