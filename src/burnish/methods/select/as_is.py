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
class AsIs(Method):
    """As it is: what asks for a gradient in the module trains, and nothing else.

    ``requires_grad`` stays as the model came. So a graph that somebody else has written, with
    adapters of its own inside, can be trained, simulated and measured as it stands:
    ``simulate(theirs, "as_is + lean(on=False)", batch)``.

    Trains the floating-point parameters whose flag was set when the recipe was joined; start is
    the model's own function. The head is no exception: ``head="auto"`` adds nothing to it. Kept for
    backward: what autograd keeps, less what the lean tape makes again. `targets` narrows it, as it
    does `full`. A model in which nothing asks for a gradient is refused.
    """

    paper: ClassVar[str] = "the baseline"
    takes_head: ClassVar[bool] = False

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        params = dict(anatomy.model.named_parameters())
        names = [n for n in anatomy.asking if params[n].is_floating_point()]
        if not names:
            raise RecipeError("as_is: nothing in this model asks for a gradient; set requires_grad "
                              "on what shall train, or name it with full(targets='...')")
        for name in chosen(anatomy, self, names, siblings=False):
            yield Selection(name)
