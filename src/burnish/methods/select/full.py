from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.asked import chosen
from ...core.method import Method
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning: every floating-point parameter trains.

    Trains all of them; start is the pre-trained function. Kept for backward: what autograd keeps,
    less what the lean tape makes again. `targets` narrows it: a role, a group or the name of a
    matrix means that weight (not its bias), any other name the tensors of that module.
    """

    paper: ClassVar[str] = "the baseline"

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        names = [n for n, p in anatomy.model.named_parameters()
                 if p.is_floating_point() and ".burnish." not in f".{n}"]
        for name in chosen(anatomy, self, names, siblings=False):
            yield Selection(name)
