from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update import rules
from ...blocks.update.codecs import form_bytes
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Adam4bit(Method):
    """4-bit Adam: AdamW whose moments are kept as 4-bit codes, block by block.

        per block of 128:  s = max |x|,  code = nearest entry of the dynamic map to x / s

    m takes a signed map, v an unsigned one. Every step decodes a slice to fp32, does Adam and
    encodes it again: 2 (1/2 + 4/128) = 1.06 bytes of state per trained weight. Tensors below 4096
    elements keep fp32 state. A value of v that is not zero never gets the code of zero, which
    would leave m / eps as the step. galore + adam4bit keeps the projected moments this way.

    Departure: the published 4-bit second moment is rank-1 normalised with a linear map without
    zero; this one is the dynamic map of the 8-bit codec with two halves of a byte per pair.
    """

    paper: ClassVar[str] = "Memory Efficient Optimizers with 4-bit States, NeurIPS 2023"

    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments")
    eps: float = setting(1e-8, "added to the root of the second moment; not below 1e-8")
    weight_decay: float = setting(0.01, "decay of the weights, times lr")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        rule = rules.AdamW(betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return Inner(rule=rule, state="4bit", name="adam4bit")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 2 * form_bytes("4bit", math.prod(shape), itemsize)
