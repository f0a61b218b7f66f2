from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update import rules
from ...blocks.update.codecs import form_bytes
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Lion(Method):
    """Lion: the sign of an interpolated momentum: one moment, every weight moves by exactly lr.

        u = sign(b1 m + (1 - b1) g)       W <- W (1 - lr wd) - lr u
        m <- b2 m + (1 - b2) g            after u, with the other beta

    m has the shape of W: half of Adam's state; m = 0 at the start, so the first step is sign(g).
    The trajectory does not depend on the scale of the loss. Take lr 3 to 10 times smaller than
    for AdamW and weight decay as much larger; small batches (below 64) lose. Entries whose
    gradient is always zero are only decayed.
    """

    paper: ClassVar[str] = "Symbolic Discovery of Optimization Algorithms, NeurIPS 2023"
    tier: ClassVar[str] = "checked against an independent equation"

    betas: tuple[float, float] = setting((0.9, 0.99), "of the step, of the momentum; "
                                         "(0.95, 0.98) if a language model is unstable")
    weight_decay: float = setting(0.0, "decay of the weights, times lr")
    state: Literal["fp32", "bf16", "8bit", "4bit"] = setting(
        "fp32", "form the momentum is kept in; bf16 is rounded stochastically")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        rule = rules.Lion(betas=self.betas, weight_decay=self.weight_decay)
        return Inner(rule=rule, state=self.state)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return form_bytes(self.state, math.prod(shape), itemsize)
