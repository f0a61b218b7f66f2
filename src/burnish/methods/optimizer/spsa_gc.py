from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.rules import SGD
from ...blocks.update.spsa import Spsa
from ...core.errors import RecipeError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class SpsaGc(Method):
    """SPSA-GC: two losses a probe, divided by the probe, and a momentum that looks ahead.

        update i = 1, 2, ...:   c_i = eps / i^eps_power,   a_i = lr / (i + offset)^rate_power
        |d| ~ U(1/2, 1), its sign a fair coin, entry by entry
        G = mean over `queries` of (L(theta + c_i d) - L(theta - c_i d)) / (2 c_i d)
        m <- momentum m + G,    theta <- theta - a_i (G + momentum m)

    on the same batch and without gradients: L may be the answer of a service that only says a
    number (`blackvip`, whose update it is). Written beside what trains little: the squared error of
    G grows with the number of entries. E[G] is the gradient as c -> 0; what divides never comes
    near 0, so all its moments are finite.

    Start: the function as it is. Kept: m, as many numbers as train; none with momentum=0. Takes 2
    `queries` evaluations an update. lr 0.01 is published (a), with eps_power 0.1 or 0.2.
    Objectives, schedules, rounding, fp32 losses and the log that repeats a run: as in `mezo`.
    """

    paper: ClassVar[str] = ("BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning, "
                            "CVPR 2023, arXiv:2303.14773")
    tier: ClassVar[str] = "checked against an independent equation"

    eps: float = setting(0.01, "radius of the first probe", alias=("c",))
    eps_power: float = setting(0.1, "how fast the radius falls")
    rate_power: float = setting(0.4, "how fast the learning rate falls")
    offset: float = setting(1.0, "updates that the fall of the rate begins after", alias=("o",))
    queries: int = setting(5, "probes averaged per update, two forwards each", alias=("n_avg",))
    momentum: float = setting(0.9, "of the gradient correction; 0: none")
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    mode: Literal["scratch", "in_place"] = setting("scratch", "where the perturbed weights live")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"spsa_gc: momentum is at least 0 and below 1, got {self.momentum:g}")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Spsa:
        return Spsa(rule=SGD(momentum=self.momentum, nesterov=self.momentum > 0), eps=self.eps,
                    eps_power=self.eps_power, rate_power=self.rate_power, offset=self.offset,
                    queries=self.queries, weight_decay=self.weight_decay, mode=self.mode,
                    noise=self.noise)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return math.prod(shape) * max(itemsize, 4) if self.momentum else 0
