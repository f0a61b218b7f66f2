from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.step import InBackward
from ...core.errors import RecipeError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class StepInBackward(Method):
    """Step in backward: each tensor is stepped as soon as its gradient is complete, and freed.

    The live gradient is the largest single tensor instead of the sum of all. Wraps any innermost
    rule; the weights after a step are those of the same rule stepped afterwards, bit for bit.
    ``optimizer.step()`` only marks the end of an update, so lr schedules run once per iteration.

        entries    g <- max(-c, min(g, c))                    c = clip_value
        norm       g <- g min(1, C / (||g|| + 1e-6))          C = max_grad_norm of the loop

    C is the one setting of every recipe: ``fit(clip=1.0)``, ``optimizer(max_grad_norm=1.0)``.
    The norm of all gradients is known when the last has gone, so each update takes a forward and
    backward more, in which gradients are squared, summed and freed (fit clips only where asked).
    ``sgd + step_in_backward`` is LOMO, ``adafactor(scale_parameter=True) + step_in_backward``
    AdaLomo: its grouped normalisation is Adafactor's, tensor by tensor.

    Refused: gradient accumulation (except of a subspace's projected gradients, see ``galore``),
    gradient scalers, several processes of which each would step along its own gradient. Nothing
    may read ``.grad`` afterwards, and a step that went wrong half-way cannot be rolled back.
    """

    paper: ClassVar[str] = ("Full Parameter Fine-tuning for Large Language Models "
                            "with Limited Resources, ACL 2024; AdaLomo, ACL Findings 2024")

    clip_value: float = setting(0.0, "c, largest entry of a gradient; 0: any")

    def __post_init__(self) -> None:
        if not 0 <= self.clip_value < math.inf:
            raise RecipeError("step_in_backward: clip_value is a positive size, or 0 for none; got "
                              f"{self.clip_value}")

    def claims(self) -> tuple[str, ...]:
        return ("the step site",)

    def optimizer(self) -> InBackward:
        return InBackward(clip_value=self.clip_value)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 2 * max(itemsize, 4) * math.prod(shape)
