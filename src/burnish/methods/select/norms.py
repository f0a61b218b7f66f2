from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Norms(Method):
    """Norm tuning: only the scales and shifts of normalisation layers train.

    ``y = gamma * normalised(x) + beta``. Trains the affine parameters of every norm; start is the
    pre-trained function. Kept for backward: norms keep their input as they do when frozen; no
    linear keeps its input. No weight decay. A model without affine norms is refused. `targets`
    narrows it to the norms of some modules: ``norms(targets="norm1")``.
    """

    paper: ClassVar[str] = ("Tuning LayerNorm in Attention (2023), arXiv:2312.11420; "
                            "Training BatchNorm and Only BatchNorm (2020), arXiv:2003.00152")
    needs: ClassVar[frozenset[str]] = frozenset({"norms"})

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        names = [f"{path}.{leaf}" if path else leaf for path in anatomy.norms
                 for leaf, _ in anatomy.model.get_submodule(path).named_parameters(recurse=False)]
        if not names:
            raise RecipeError("norms: this model has no norm with trainable scale or shift")
        for name in chosen(anatomy, self, names, siblings=True):
            yield Selection(name, decay=False)
