from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update import rules
from ...blocks.update.codecs import form_bytes
from ...blocks.update.step import Inner
from ...core.errors import RecipeError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """SGD: the gradient, or its running sum; no state without momentum.

        b <- mu b + (g + wd W)        W <- W - lr b

    With mu = 0 (the default) there is no state at all; ``sgd + step_in_backward`` is LOMO. As
    everywhere inside a subspace, ``galore + sgd`` applies the decay to W itself.
    """

    paper: ClassVar[str] = "A Stochastic Approximation Method, 1951"
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "exactly_what_trains_moves on cnn": "a bias before a batch norm has no gradient but "
        "rounding, which a plain step loses; tests/methods/test_sgd.py"}

    small: ClassVar[dict[str, float]] = {"momentum": 0.9}

    momentum: float = setting(0.0, "mu; 0 keeps no state")
    nesterov: bool = setting(False, "step along g + mu b instead of b")
    weight_decay: float = setting(0.0, "added to the gradient, times W")
    state: Literal["fp32", "bf16", "8bit", "4bit"] = setting("fp32", "form the momentum is kept in")

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise RecipeError("sgd(nesterov=True) looks ahead along the momentum, and there is "
                              "none; give one, e.g. momentum=0.9")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        rule = rules.SGD(momentum=self.momentum, nesterov=self.nesterov,
                         weight_decay=self.weight_decay)
        return Inner(rule=rule, state=self.state)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor; torch's own momentum has the weight's dtype."""
        n = math.prod(shape)
        if not self.momentum:
            return 0
        return n * itemsize if self.state == "fp32" else form_bytes(self.state, n, itemsize)
