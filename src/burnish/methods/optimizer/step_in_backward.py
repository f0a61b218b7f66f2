from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.step import InBackward
from ...core.method import Method


@dataclass(frozen=True, kw_only=True)
class StepInBackward(Method):
    """Step in backward: each tensor is stepped as soon as its gradient is complete, and freed.

    The live gradient is the largest single tensor instead of the sum of all. Wraps any innermost
    rule; the weights after a step are those of the same rule stepped afterwards, bit for bit.
    ``optimizer.step()`` only marks the end of an update, so lr schedules run once per iteration.

    Refused: gradient accumulation (except of a subspace's projected gradients, see ``galore``),
    clipping by the global norm, gradient scalers. Nothing may read ``.grad`` afterwards, and a
    step that went wrong half-way cannot be rolled back.
    """

    paper: ClassVar[str] = ("Full Parameter Fine-tuning for Large Language Models "
                            "with Limited Resources, ACL 2024")

    def claims(self) -> tuple[str, ...]:
        return ("the step site",)

    def optimizer(self) -> InBackward:
        return InBackward(name="step_in_backward")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 8 * math.prod(shape)
