from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.svrg import Svrg
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class MezoSvrg(Method):
    """MeZO-SVRG: zeroth-order steps whose noise over batches is taken off at an anchor.

        s(theta, z) = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
        every period, on its first `batches` batches:
            theta~ = theta,   g~ = mean of s(theta~, z~),   theta <- theta - anchor_rate lr g~ z~
        on each of the others:
            g = s(theta, z) - s(theta~, z),                 theta <- theta - lr (g z + g~ z~)

    each batch of a period's beginning moves its share of the first line at once; decay of matrices
    as in `mezo`. One batch at the anchor is a large one if the others are small: give the data so,
    or take several for it. The mean of a step is the gradient's; what one batch says too much is
    what it says at theta~ too.

    Start: the function as it is. Kept: theta~, as many numbers as train; g~ and z~ are drawn again
    from the log. Two evaluations an update at an anchor, four at others. Noise, scratch,
    objectives, rounding and the log that repeats a run: as in `mezo`. Schedules of what lives
    (lisa) are refused: a tensor that joins within a period has no anchor.

    Departures: the anchor's batches are the run's own, not a second pass over all data (the
    published large-batch form); with one query there is one z~ a period whatever `batches` is.
    """

    paper: ClassVar[str] = ("Variance-reduced Zeroth-Order Methods for Fine-Tuning Language "
                            "Models, ICML 2024")
    tier: ClassVar[str] = "from the text"
    small: ClassVar[dict[str, int]] = {"every": 2}

    eps: float = setting(1e-3, "radius of the probe; 1e-2 with LoRA, 1e-1 with prefixes")
    queries: int = setting(1, "probes averaged per update, two forwards each")
    every: int = setting(2, "q, updates of a period", alias=("q",), other=(3,))
    batches: int = setting(1, "of a period's updates, those at the anchor", other=(2,),
                           beside={"every": 3})
    anchor_rate: float = setting(1.0, "learning rate at the anchor over that of the others",
                                 other=(3.0,))
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Svrg:
        return Svrg(eps=self.eps, queries=self.queries, every=self.every, batches=self.batches,
                    anchor_rate=self.anchor_rate, weight_decay=self.weight_decay,
                    noise=self.noise)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return math.prod(shape) * itemsize
