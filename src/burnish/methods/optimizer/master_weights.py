from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.step import Rounding
from ...core.method import Method


@dataclass(frozen=True, kw_only=True)
class MasterWeights(Method):
    """Master weights: an fp32 copy takes the steps, the half-precision weight is its image.

    +4 bytes per trained weight, exact. It lives in the optimizer's state, made at a tensor's first
    step; fp32 weights need none. Beside ``galore`` it undoes most of the saving: there, prefer
    stochastic_rounding.
    """

    paper: ClassVar[str] = "Mixed Precision Training, ICLR 2018"
    tier: ClassVar[str] = "checked against an independent equation"

    def claims(self) -> tuple[str, ...]:
        return ("the rounding of the weights",)

    def optimizer(self) -> Rounding:
        return Rounding(kind="master", name="master_weights")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return math.prod(shape) * (8 + (4 if itemsize < 4 else 0))
