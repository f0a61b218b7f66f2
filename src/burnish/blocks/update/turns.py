"""Coefficients and the places they stand at train by turns, until the places stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from ...core.events import EARLY
from .live import TrainableSchedule


class Moving(Protocol):
    """What has coefficients `a` and places `at`."""

    a: nn.Parameter
    at: nn.Parameter

    def confine(self) -> None:
        """Bring places that have left the range back to its border."""


class Turns:
    """`first` updates move every a alone, `second` every at alone, and so on; after the share
    `search` of a run of known length the places stay. Whoever waits keeps its moments.

    A handler of a run's events, early, so that others see what is live.
    """

    phase: ClassVar[int] = EARLY

    def __init__(self, terms: Sequence[Moving], first: int, second: int, search: float):
        self.terms, self.first, self.second, self.search = terms, first, second, search
        groups = {"a": [t.a for t in terms], "at": [t.at for t in terms]}
        self.schedule = TrainableSchedule(groups, self.live)     # knows no optimizer: moments stay
        self.until: int | None = None

    def start(self, total: int | None) -> None:
        self.until = None if total is None else round(self.search * total)

    def live(self, step: int) -> frozenset[str]:
        """What trains in an update."""
        over = self.until is not None and step >= self.until
        turn = step % (self.first + self.second)
        return frozenset({"a" if over or turn < self.first else "at"})

    def step_begin(self, step: int) -> None:
        self.schedule.update(step)

    def after_update(self, step: int) -> None:
        if self.schedule.live == {"at"}:
            for t in self.terms:
                t.confine()

    def state_dict(self) -> dict[str, Any]:
        return {"until": self.until, **self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.until = state["until"]
        self.schedule.load_state_dict(state)
