from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import RecipeError
from ...core.method import Method
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Linear probe: only the head trains, the body is a fixed feature extractor.

    The body does not move and is one function of its input: in training too it runs in evaluation
    mode, so dropout there is off and normalisations use, and keep, the statistics they came with.

    Trains the head's parameters (the language-model head too, when that is the head). Kept for
    backward: the head's input; nothing below the head is kept at all. A model without a head is
    refused.
    """

    paper: ClassVar[str] = "the baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"head"})
    fixed: ClassVar[bool] = True

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not anatomy.head:
            raise RecipeError("linear_probe: no head was found on this model; name one with "
                              "full(targets='...')")
        for path in anatomy.head:
            for leaf, _ in anatomy.model.get_submodule(path).named_parameters():
                yield Selection(f"{path}.{leaf}")
