from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update import rules
from ...blocks.update.codecs import form_bytes
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class AdamW(Method):
    """AdamW: Adam whose weight decay acts on the weight, not on the gradient.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        W <- W (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    m, v have the shape of W: 2 elements of state per trained weight. A recipe that names no
    optimizer takes this one. With fp32 state and no wrapper it is `torch.optim.AdamW(fused=True)`,
    which keeps m and v in the weight's dtype: in bf16 that freezes v (its changes are below half
    a spacing), so prefer ``adam8bit``, ``state="bf16"`` (rounded stochastically) or fp32 weights.
    """

    paper: ClassVar[str] = "Decoupled Weight Decay Regularization, ICLR 2019"
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "beside_a_partner_it_acts":
            "it is what a recipe without an optimizer takes; tests/methods/test_adamw.py compares "
            "with torch"}

    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments")
    eps: float = setting(1e-8, "added to the root of the second moment")
    weight_decay: float = setting(0.01, "decay of the weights, times lr")
    state: Literal["fp32", "bf16", "8bit", "4bit"] = setting("fp32", "form the moments are kept in")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        rule = rules.AdamW(betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return Inner(rule=rule, state=self.state)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor; torch's own moments have the weight's dtype."""
        n = math.prod(shape)
        return 2 * (n * itemsize if self.state == "fp32" else form_bytes(self.state, n, itemsize))
