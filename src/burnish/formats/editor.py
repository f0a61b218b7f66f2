"""The file of what edits a model: what its nets have learnt, and of which model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FormatError, nearest
from . import safe
from .fingerprint import fingerprint

#: entries of the file beside its tensors
HOW, BASE, LESSONS = "burnish editor", "burnish editor base", "burnish editor lessons"


def tensors(editor: Any) -> dict[str, Tensor]:
    """Its nets and rates by name."""
    return {f"{part}.{n}": t for part in ("nets", "alpha")
            for n, t in getattr(editor, part).state_dict().items()}


def save(editor: Any, how: str, lessons: int, path: str | Path) -> None:
    """how: the expression of the method that made it."""
    safe.save_file(tensors(editor), path, {HOW: how, BASE: fingerprint(editor.model).digest,
                                           LESSONS: str(lessons)})


def said(path: str | Path) -> dict[str, Any]:
    """how, base (a fingerprint) and lessons of such a file. FormatError for any other."""
    with safe.opened(path) as (file, _):
        meta: Mapping[str, str] = file.metadata() or {}
    if not {HOW, BASE, LESSONS} <= set(meta) or not meta[LESSONS].isdigit():
        raise FormatError(f"{path} is no editor; burnish edit --lessons writes one")
    return {"how": meta[HOW], "base": meta[BASE], "lessons": int(meta[LESSONS])}


@torch.no_grad()
def load(editor: Any, path: str | Path) -> bool:
    """Its values into one that was made by the same expression; whether it has learnt of this very
    model. FormatError where it edits other matrices."""
    own, found = tensors(editor), safe.load_file(path)
    for name in own:
        if name not in found:
            raise FormatError(f"{path} edits other matrices than this model has: it holds no "
                              f"{name}{nearest(name, list(found))}")
        if found[name].shape != own[name].shape:
            raise FormatError(f"{path} edits another model: its {name} is "
                              f"{list(found[name].shape)}, expected {list(own[name].shape)}")
    if more := sorted(set(found) - set(own)):
        raise FormatError(f"{path} edits other matrices than this model has: {more[0]}")
    parts: dict[str, nn.Module] = {p: getattr(editor, p) for p in ("nets", "alpha")}
    for part, module in parts.items():
        module.load_state_dict({n.removeprefix(f"{part}."): t for n, t in found.items()
                                if n.startswith(f"{part}.")})
    return bool(said(path)["base"] == fingerprint(editor.model).digest)
