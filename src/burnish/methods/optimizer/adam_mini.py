from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.mini import MiniAdam
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class AdamMini(Method):
    """Adam-mini: Adam with one second moment per group of weights that learn at one rate.

        m <- b1 m + (1 - b1) g                                    p elements
        v_b <- b2 v_b + (1 - b2) mean of g^2 over group b         one number per group
        W <- W (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v_b / (1 - b2^t)) + eps)

    A group is all that leads to one head of queries or keys (key heads, where they are fewer), to
    one output of any other matrix of attention and MLPs, to one token in tables and in a language
    model's head; every other tensor is one group. Of a fused matrix each part has its own groups,
    and a matrix that is stored turned over (GPT-2) groups its columns. State p + #groups, half of
    Adam's; a group of one weight is Adam. The learning rate is that for AdamW.

    Where a model does not tell its heads, or queries and keys alternate along a fused matrix, their
    outputs are groups of their own. A tensor of experts is one group.
    """

    paper: ClassVar[str] = "Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025"
    tier: ClassVar[str] = "checked against an independent equation"

    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments")
    eps: float = setting(1e-8, "added to the root of the second moment")
    weight_decay: float = setting(0.0, "decay of the weights, times lr")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        return Inner(rule=MiniAdam(betas=self.betas, eps=self.eps,
                                   weight_decay=self.weight_decay))
