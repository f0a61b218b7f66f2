from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.factored import Factored
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Adafactor(Method):
    """Adafactor: Adam's second moment as one number per row and one per column.

        b_t = 1 - t^(-c)
        R <- b R + (1 - b) rowmean(G^2 + 1e-30)          (m,)
        C <- b C + (1 - b) colmean(G^2 + 1e-30)          (n,)
        U = G / sqrt(R C^T / mean(R)),   U <- U / max(1, RMS(U) / d)
        W <- W (1 - lr wd) - lr U        times max(1e-3, RMS(W)) with scale_parameter

    State m + n per matrix (m n more with beta1); vectors keep V in full. Convolutions are seen as
    (out, rest). No temporary is larger than a strip. The learning rate is the caller's, as for
    AdamW; with scale_parameter, 1e-3 is published for fine-tuning.
    """

    paper: ClassVar[str] = ("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (2018), "
                            "arXiv:1804.04235")
    tier: ClassVar[str] = "checked against an independent equation"

    decay_rate: float = setting(0.8, "c, how fast the moments come to rest")
    clip: float = setting(1.0, "d, the root mean square an update is cut to", above=0.0)
    beta1: float = setting(0.0, "of a running mean of U; 0 keeps none")
    scale_parameter: bool = setting(False, "steps relative to the weight's own size")
    weight_decay: float = setting(0.0, "decay of the weights, times lr")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        return Inner(rule=Factored(
            decay_rate=self.decay_rate, clip=self.clip, beta1=self.beta1,
            scale_parameter=self.scale_parameter, weight_decay=self.weight_decay))

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        n = math.prod(shape)
        held = n if len(shape) < 2 else shape[0] + n // shape[0]
        return (held + (n if self.beta1 else 0)) * max(itemsize, 4)
