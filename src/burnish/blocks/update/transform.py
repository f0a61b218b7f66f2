"""Gradient transforms: words between the gradient and the rule, chained in the order of a recipe.

    G -> first transform -> second -> ... -> subspace and rule

A transform is a function of one tensor's whole gradient. It may keep state, by name, in the
parameter's own state, so it is saved and resumed with the optimizer::

    @dataclass(frozen=True, kw_only=True)
    class Slow(Transform):
        states: ClassVar[tuple[str, ...]] = ("slow",)
        def apply(self, G, seen): ...

Several transforms are chained; nothing is refused but an own step that makes no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .step import Plan


@dataclass
class Seen:
    """What a transform knows of the tensor: its name, its weight (not to be changed), its own
    part of the parameter's state, the number of the update (from 1), the param group."""

    name: str
    weight: Tensor
    state: MutableMapping[str, Any]
    step: int
    group: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """See the module. Subclasses answer :meth:`apply`."""

    word: ClassVar[str] = "transform"
    #: names in the parameter's state
    states: ClassVar[tuple[str, ...]] = ()

    name: str = "transform"

    def apply(self, G: Tensor, seen: Seen) -> Tensor:
        """The gradient for the next word: a new tensor, or G itself where nothing changes."""
        raise NotImplementedError

    def wrap(self, plan: Plan) -> Plan:
        names = {"transform": self.name, **plan.names}           # the first one speaks for all
        return dataclasses.replace(plan, transforms=(*plan.transforms, self), names=names)
