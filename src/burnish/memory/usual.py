"""What a recipe is given where nobody says otherwise, and what becomes of it where that is refused.

`fit` and the search both ask here, so a plan promises what will be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..core.anatomy import Anatomy
from ..core.errors import RecipeError
from ..core.outputs import vocabulary_head
from ..core.recipe import Recipe, parse
from .cache import Refused

#: the part that makes a language model's loss by chunks
CHUNKED = "chunked_loss"

T = TypeVar("T")


@dataclass(frozen=True)
class Usual:
    """chunks: is the loss of this model made by chunks where nobody says how?"""

    chunks: bool = False

    def __call__(self, recipe: Any) -> Recipe:
        """The recipe as this model is usually trained: a language model with its loss made by
        chunks, unless the recipe says how, or a part of it reads whole logits anyway."""
        parts = parse(recipe)
        if not self.chunks or parts.named(CHUNKED) is not None or \
                any("logits" in m.needs for m in parts):
            return parts
        return parse([*parts, CHUNKED])

    def run(self, asked: Any, do: Callable[[Recipe], T]) -> tuple[Recipe, T, str]:
        """(the recipe that was done, what ``do`` made of it, why it is not the usual one).

        What was asked for is done as it is usually trained; where the model refuses the part that
        was added, as it was asked for. Raises what ``do`` raises of any other matter.
        """
        parts = parse(asked)
        recipe = self(parts)
        try:
            return recipe, do(recipe), ""
        except (RecipeError, Refused) as error:
            if recipe == parts or CHUNKED not in str(error):
                raise
            why = str(error)
        return parts, do(parts), why


#: every recipe as it was said
AS_SAID = Usual()


def usual(model: nn.Module) -> Usual:
    """How recipes are completed for `model`."""
    anatomy = Anatomy.of(model)
    return Usual(anatomy.head_kind == "lm" and vocabulary_head(anatomy) is not None)
