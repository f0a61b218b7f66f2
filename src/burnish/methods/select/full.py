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
class Full(Method):
    """Full fine-tuning: every floating-point parameter trains.

    Trains all of them; start is the pre-trained function. Kept for backward: what autograd keeps,
    less what the lean tape makes again. `targets` narrows it to the weights of some places.
    """

    paper: ClassVar[str] = "the baseline"

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if self.targets is not None:
            from ...core.targets import match

            for place in match(anatomy, self.targets):
                if place.rows:
                    raise RecipeError(f"full: {place.name} is a run of rows of one parameter, "
                                      "which trains whole or not at all; target the fused weight, "
                                      "or give these rows a delta")
                yield Selection(f"{place.path}.{place.param}" if place.path else place.param)
            return
        for name, p in anatomy.model.named_parameters():
            if p.is_floating_point() and ".burnish." not in f".{name}":
                yield Selection(name)
