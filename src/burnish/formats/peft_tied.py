"""Rows of tied tables as PEFT has them: every module that reads the table gets them, and a folder
of TRAINABLE_TOKENS holds them once for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.anatomy import Anatomy
from ..core.errors import FormatError
from .peft_folder import PeftFolder
from .peft_forms import TOKENS


def once(anatomy: Anatomy, what: PeftFolder, folder: str | Path) -> None:
    """Take out of a folder what it holds once more for the other ends of a table."""
    first = {place.path: place for place in anatomy.places if place.kind == "embedding"}
    for path in [p for p, own in what.own.items() if own.form is TOKENS]:
        name = anatomy.aliases.get(f"{path}.weight", "").removesuffix(".weight")
        if name in what.own and what.own[name].form is TOKENS:
            mine, there = what.own[path], what.own[name]
            if mine.settings != there.settings or not all(
                    torch.equal(t, there.tensors[n]) for n, t in mine.tensors.items()):
                raise FormatError(f"{folder} has other rows for {path} than for {name}, which are "
                                  "one table")
            del what.own[path]
        elif path in first:
            check_ends(anatomy, path, str(folder))


def check_ends(anatomy: Anatomy, path: str, where: str) -> None:
    """Raises FormatError where PEFT computes something else at another end of a table."""
    place = next((p for p in anatomy.places if p.path == path and p.kind == "embedding"), None)
    ends = () if place is None else anatomy.ends(place)
    config: Any = getattr(anatomy.model, "config", None)
    if ends and not getattr(config, "tie_word_embeddings", False):
        raise FormatError(f"{where}: {path} is tied to {ends[0].path}, which PEFT knows by "
                          "config.tie_word_embeddings alone, and this model's does not say so")
    for end in ends:
        module = anatomy.model.get_submodule(end.path)
        if isinstance(module, nn.Linear) and module.bias is not None:
            raise FormatError(f"{where}: {end.path} is tied to {path} and has a bias, which PEFT's "
                              "tokens leave out there; merge instead")
