"""Updates that count for less: ``p <- p_before + factor (p_after - p_before)``.

Whatever the rule: a gradient that is multiplied before Adam steps is divided out again, so the step
itself is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Damped:
    """Tensors whose updates are damped. `hold` before an update, `follow` after it (which holds
    for the next); a handler of events that does so."""

    def __init__(self, params: Iterable[nn.Parameter], factor: float):
        self.params, self.factor = list(params), factor
        self.before: list[Tensor] = []

    @torch.no_grad()
    def hold(self) -> None:
        """Where the tensors are."""
        self.before = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def follow(self) -> None:
        """The last update counts `factor` times."""
        for p, was in zip(self.params, self.before, strict=True):
            p.copy_(torch.lerp(was, p, self.factor))
            was.copy_(p)

    def before_update(self, step: int) -> None:
        self.hold()

    def after_update(self, step: int) -> None:
        self.follow()
        self.before = []
