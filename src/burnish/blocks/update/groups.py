"""The groups of an optimizer: which tensors have a learning rate and a decay in common, and rules
that say both: one carries them from a narrow model of a family to a wide one.

    matrices of blocks (fan-in and width grow alike)    lr d0 / d,   decay sqrt(d / d0)
    all else (embeddings, head, norms, biases)          lr,          no decay

AdamW with decay ``lr wd W`` settles where singular values go as sqrt(lr / wd), so that with these
they go as d^-3/4, and with the number of directions the gain of a layer stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError
from ...core.processes import is_sharded

if TYPE_CHECKING:
    from .plan import Plan


class Rates(Protocol):
    """What multiplies learning rates and decays."""

    def on(self, width: int | None, inside: Callable[[str], bool]) -> Rates:
        """The rule for a model of that width; inside: is a weight of this name a matrix of a
        repeated block?"""

    def factors(self, name: str, p: Tensor) -> tuple[float, float]:
        """What a tensor's learning rate and decay are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """One factor of all learning rates."""

    word: ClassVar[str] = "groups"

    rate: float
    name: str = "times"

    def wrap(self, plan: Plan) -> Plan:
        return plan.say("groups", self.name, rates=self)

    def on(self, width: int | None, inside: Callable[[str], bool]) -> Times:
        return self

    def factors(self, name: str, p: Tensor) -> tuple[float, float]:
        return self.rate, 1.0


@dataclass(frozen=True, kw_only=True)
class Widths:
    """See the module. proxy: d0, the width lr and decay were found at.  width: d; 0: the model's.

    inside: is a weight of this name a matrix of a repeated block?
    """

    word: ClassVar[str] = "groups"

    proxy: int
    width: int = 0
    inside: Callable[[str], bool] | None = None
    name: str = "width_rule"

    def __post_init__(self) -> None:
        if self.proxy < 1 or self.width < 0:
            raise RecipeError(f"{self.name}: proxy and width are widths of models, got "
                              f"proxy={self.proxy} and width={self.width}")

    def wrap(self, plan: Plan) -> Plan:
        return plan.say("groups", self.name, rates=self)

    def on(self, width: int | None, inside: Callable[[str], bool]) -> Widths:
        return replace(self, width=self.width or width or 0, inside=inside)

    def factors(self, name: str, p: Tensor) -> tuple[float, float]:
        if p.dim() < 2 or self.inside is None or not self.inside(name):
            return 1.0, 0.0
        if not self.width:
            raise ConfigError(f"{self.name}: this model does not say how wide its states are; "
                              f"set {self.name}(wide=...)")
        return self.proxy / self.width, math.sqrt(self.width / self.proxy)


def param_groups(named: Sequence[tuple[str, nn.Parameter]], lr: float, weight_decay: float,
                 rates: Rates | None = None) -> list[dict[str, Any]]:
    """One group per learning rate and decay met; tied parameters enter once. Sharded tensors stand
    apart from whole ones: no kernel takes both at once.

    A tensor's ``burnish_lr`` multiplies its learning rate, its ``burnish_decay`` (False: none) its
    decay, and `rates` both.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, p in named:
        if id(p) in seen:
            continue
        seen.add(id(p))
        rate, decay = (1.0, 1.0) if rates is None else rates.factors(name, p)
        key = (rate * float(getattr(p, "burnish_lr", 1.0)),
               decay * float(getattr(p, "burnish_decay", True)), is_sharded(p))
        group = groups.setdefault(key, {"params": [], "lr": lr * key[0],
                                        "weight_decay": weight_decay * key[1]})
        group["params"].append((name, p))
    if not groups:
        raise ConfigError("nothing trains: the optimizer got no parameters")
    return list(groups.values())
