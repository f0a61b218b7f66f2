from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.step import Rounding
from ...core.method import Method


@dataclass(frozen=True, kw_only=True)
class Kahan(Method):
    """Kahan summation: half-precision weights beside the part that rounding cut off.

        y = rn(c - lr u)      t = rn(W + y)      c <- rn(y - (t - W))      W <- t

    rn rounds to the dtype of W; c has its shape and dtype and starts at zero: +2 bytes per trained
    weight, deterministic. Together they hold about 16 bits, so changes below 2^-16 of the weight
    are still lost (at W = 1 a step of 3e-5 works, 1e-5 never moves it): then take master_weights
    or stochastic_rounding.
    """

    paper: ClassVar[str] = "Revisiting BFloat16 Training, 2020"
    tier: ClassVar[str] = "checked against an independent equation"

    def claims(self) -> tuple[str, ...]:
        return ("the rounding of the weights",)

    def optimizer(self) -> Rounding:
        return Rounding(kind="kahan", name="kahan")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return math.prod(shape) * (8 + (2 if itemsize < 4 else 0))
