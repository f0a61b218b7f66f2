"""Simultaneous perturbation as Spall has it: two losses, and a division by the probe.

    d = +-(1/2 + u/2),  u ~ U(0, 1)          each entry by itself, its sign a fair coin
    G = mean of (L(theta + c d) - L(theta - c d)) / (2 c d)        entry by entry

    E[G] = gradient as c -> 0: for i != j the mean of d_j / d_i is 0, for i = j it is 1

1 / d must have finite moments, which is why no entry of d comes near 0: of Gaussian noise, or of
U(-1, 1), the mean of 1 / |d| is infinite. c and the learning rate fall as powers of the update's
number. d is drawn again wherever it is needed, and a run is its log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import RecipeError
from .noise import STREAMS
from .plan import Plan
from .rules import SGD, Rule
from .zoo import Zoo, ZooOptimizer


@dataclass
class Divided:
    """(seed, name) -> d of that tensor, or 1 / d."""

    base: Any
    inverse: bool
    turn: int = 0                                # is told, and one stream serves all updates

    def __call__(self, seed: int, name: str) -> Any:
        stream = self.base(seed, name)
        return stream if name.endswith("/round") else _Signed(stream, self.inverse)


@dataclass(frozen=True)
class _Signed:
    stream: Any
    inverse: bool

    def normal(self, n: int, offset: int = 0, *, device: torch.device | None = None) -> Tensor:
        """Elements of the stream; called as whoever moves along noise calls it."""
        x = self.stream.uniform(n, offset, device=device).mul_(2).sub_(1)      # never 0
        d = x.abs().add_(1).div_(2).copysign_(x)
        return d.reciprocal_() if self.inverse else d


@dataclass(frozen=True, kw_only=True)
class Spsa(Zoo):
    """The innermost answer of SPSA; eps is c and lr is a, both of the first update.

    c_i = c / i^eps_power,  a_i = a / (i + offset)^rate_power,  i from 1.
    """

    eps: float = 0.01
    queries: int = 5
    rule: Rule | None = SGD(momentum=0.9, nesterov=True)
    eps_power: float = 0.1
    rate_power: float = 0.4
    offset: float = 1.0
    name: str = "spsa_gc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps_power < 0 or self.rate_power < 0 or self.offset < 0:
            raise RecipeError(f"{self.name}: the radius and the rate fall, by powers and an offset "
                              f"of at least 0; got eps_power={self.eps_power:g}, rate_power="
                              f"{self.rate_power:g}, offset={self.offset:g}")

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> SpsaOptimizer:
        return SpsaOptimizer(groups, self, plan, seed)


class SpsaOptimizer(ZooOptimizer):
    """See the module. State of a parameter: its momentum."""

    spec: Spsa
    TOLD: ClassVar[tuple[str, ...]] = (*ZooOptimizer.TOLD, "eps_power", "rate_power", "offset")

    def __init__(self, groups: list[dict[str, Any]], spec: Spsa, plan: Plan, seed: int):
        super().__init__(groups, spec, plan, seed)
        base = STREAMS[spec.noise]
        self.noise, self.moves = Divided(base, inverse=False), Divided(base, inverse=True)

    def _radius(self, update: int) -> float:
        return super()._radius(update) / (update + 1) ** self.spec.eps_power

    def _rates(self, update: int) -> list[float]:
        fallen = (update + 1 + self.spec.offset) ** self.spec.rate_power
        return [lr / fallen for lr in super()._rates(update)]
