from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.step import Rounding
from ...core.method import Method


@dataclass(frozen=True, kw_only=True)
class StochasticRounding(Method):
    """Stochastic rounding: bf16 weights that lose no update on average.

        W <- cut16(bits(x) + n),  n uniform in [0, 65535],  x = the step's result in fp32

    so E[W] = x, where rounding to nearest drops every change below half a spacing (0.2 to 0.4 %
    of the weight). No bytes of state. n comes from a counter stream of (seed, tensor, step,
    element): separate from dropout, the same on every rank and after a resume. bf16 only: fp32
    weights need none, fp16 ones are refused.
    """

    paper: ClassVar[str] = "Revisiting BFloat16 Training, 2020"
    tier: ClassVar[str] = "checked against an independent equation"

    def claims(self) -> tuple[str, ...]:
        return ("the rounding of the weights",)

    def optimizer(self) -> Rounding:
        return Rounding(kind="stochastic", name="stochastic_rounding")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 8 * math.prod(shape)
