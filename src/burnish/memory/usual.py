"""What a recipe is given where nobody says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.anatomy import Anatomy
from ..core.outputs import vocabulary_head
from ..core.recipe import Recipe, parse

#: the part that makes a language model's loss by chunks
CHUNKED = "chunked_loss"


def usual(model: nn.Module) -> Callable[[Any], Recipe]:
    """recipe -> the recipe as this model is usually trained: a language model with its loss made by
    chunks, unless the recipe says how, or a part of it reads whole logits anyway."""
    anatomy = Anatomy.of(model)
    language = anatomy.head_kind == "lm" and vocabulary_head(anatomy) is not None

    def given(recipe: Any) -> Recipe:
        parts = parse(recipe)
        if not language or parts.named(CHUNKED) is not None or \
                any("logits" in m.needs for m in parts):
            return parts
        return parse([*parts, CHUNKED])

    return given
