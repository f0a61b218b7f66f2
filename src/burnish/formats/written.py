"""Saving a tuned model as an adapter folder (the layout is in folder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import fingerprint, folder

if TYPE_CHECKING:
    from ..engine.tuned import Tuned


def save(tuned: Tuned, path: Path, run: Mapping[str, Any] | None = None,
         card: str | None = None, base: str | None = None) -> Path:
    """Write every adapter of `tuned`. base: name or folder of the base; default what the model
    says of itself (``name_or_path``)."""
    config = {
        "recipe": str(tuned.recipe),
        "parts": [{"method": m.name, **m.settings()} for m in tuned.recipe],
        "base": {"name": base or _name_of(tuned.model),
                 "fingerprint": _fingerprint(tuned).to_json()},
        "targets": tuned._active.targets,
        "head": tuned._active.head,
        "seed": tuned._active.seed,
        "selected": sorted(tuned._active.selected),
        "active": [list(a) for a in tuned.state.active] or None,
        "training": tuned.training,
        "adapters": {n: {"recipe": str(a.recipe), "targets": a.targets, "head": a.head,
                         "seed": a.seed, "settled": a.settled} for n, a in tuned.adapters.items()},
    }
    tensors: dict[str, Tensor] = {}
    for name in tuned.adapters:
        tensors |= tuned.tensors(name)
    return folder.write_adapter(path, tensors, config, card=card, run=run)


def _fingerprint(tuned: Tuned) -> fingerprint.Fingerprint:
    """Of the base as it was before anything trained; tensors that wait aside are read there."""
    trained = {n for a in tuned.adapters.values() for n in a.selected}
    taken = tuned.base_lines                     # an original does not change: read it once
    for path, param in tuned.originals:
        name = f"{path}.{param}" if path else param
        if name not in taken:
            taken[name] = fingerprint.line(tuned.originals.get(path, param),
                                           content=name not in trained)
    return fingerprint.fingerprint(tuned.model, taken, whole=trained)


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "") or getattr(
        getattr(model, "config", None), "_name_or_path", "")
    return name or type(model).__name__

