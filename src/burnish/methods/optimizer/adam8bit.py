from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update import rules
from ...blocks.update.codecs import form_bytes
from ...blocks.update.step import Inner
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Adam8bit(Method):
    """8-bit Adam: AdamW whose moments are kept as 8-bit codes, block by block.

        per block of 256:  s = max |x|,  code = nearest entry of the dynamic map to x / s

    m takes a signed map, v an unsigned one. Every step decodes a slice to fp32, does Adam and
    encodes it again: 2 (1 + 4/256) = 2.03 bytes of state per trained weight. Tensors below 4096
    elements keep fp32 state. A value of v that is not zero never gets the code of zero, which
    would leave m / eps as the step. galore + adam8bit keeps the projected moments this way.
    """

    paper: ClassVar[str] = "8-bit Optimizers via Block-wise Quantization, ICLR 2022"

    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments")
    eps: float = setting(1e-8, "added to the root of the second moment; not below 1e-8")
    weight_decay: float = setting(0.01, "decay of the weights, times lr")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        rule = rules.AdamW(betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return Inner(rule=rule, state="8bit", name="adam8bit")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 2 * form_bytes("8bit", math.prod(shape), itemsize)
