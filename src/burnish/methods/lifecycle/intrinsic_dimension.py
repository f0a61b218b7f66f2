from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True)
class Sweep:
    """Quality over the size of the subspace: `points` (d, P(d)), d rising. whole: P of training
    everything; share: of it that counts as there."""

    points: list[tuple[int, float]]
    whole: float
    share: float

    @property
    def bar(self) -> float:
        """``P - (1 - share) |P|`` of training everything: a share of it where it is positive."""
        return self.whole - (1 - self.share) * abs(self.whole)

    @property
    def reached(self) -> int | None:
        """The smallest d that was tried and reaches the bar; None where none does."""
        return next((d for d, p in self.points if p >= self.bar), None)

    @property
    def below(self) -> int | None:
        """The largest d below it that was tried, and does not."""
        first = self.reached
        return max((d for d, _ in self.points if first is None or d < first), default=None)


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimension(Method):
    """Intrinsic dimension: the size of random subspace in which a task can nearly be learnt.

    d = least, least * times, least * times^2, ... up to `most`: each is trained by itself in a
    subspace of that size (`said`) and scored, P(d); d_int is the smallest with ``P(d) >= P -
    (1 - share) |P|``, P the score of training everything (share 0.9: d_int90). `beyond` sizes past
    it show that the curve stays there. Then the gap below it is halved `halvings` times, by the
    geometric mean, so that d_int lies between two sizes as near as wanted.

    Trains nothing itself: a diagnosis, which suggests how small an update may be. Scores are noisy
    near the bar, and d_int depends on the sizes tried; both neighbours are told.
    ``burnish dimension`` does the runs and draws the curve.
    """

    paper = ("Measuring the Intrinsic Dimension of Objective Landscapes (2018), "
             "arXiv:1804.08838; Intrinsic Dimensionality Explains the Effectiveness of Language "
             "Model Fine-Tuning (2020), arXiv:2012.13255")
    tier = "checked against the paper's numbers"

    least: int = setting(10, "smallest size")
    most: int = setting(10_000, "largest size")
    times: float = setting(2.0, "a size over the one before")
    share: float = setting(0.9, "of the score of training everything")
    beyond: int = setting(1, "sizes past the first that reaches it")
    halvings: int = setting(0, "how often the gap below it is halved")

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most or not self.times > 1:
            raise ConfigError("intrinsic_dimension: 1 <= least <= most and times above 1 are "
                              f"expected, got {self.least}, {self.most} and {self.times}")
        if not 0 < self.share <= 1 or min(self.beyond, self.halvings) < 0:
            raise ConfigError("intrinsic_dimension: a share above 0 and up to 1, and beyond and "
                              "halvings of at least 0 are expected")

    def sizes(self) -> list[int]:
        """The sizes of the sweep, rising, each once."""
        found, size = list[int](), float(self.least)
        while round(size) <= self.most:
            found.append(round(size))
            size *= self.times
        return list(dict.fromkeys(found))

    def lifecycle(self, *, score: Callable[[int | None], float]) -> Sweep:
        """The sweep. score: quality after training in a subspace of this size, or (None) of
        everything, higher is better."""
        whole = float(score(None))
        found: dict[int, float] = {}

        def now() -> Sweep:
            return Sweep(sorted(found.items()), whole, self.share)

        past = 0
        for d in self.sizes():
            if now().reached is not None:
                past += 1
                if past > self.beyond:
                    break
            found[d] = float(score(d))
        for _ in range(self.halvings if now().reached is not None else 0):
            low, high = now().below, now().reached
            middle = round(math.sqrt((low or 1) * high))         # type: ignore[operator]
            if middle in found:                                  # there is nothing between
                break
            found[middle] = float(score(middle))
        return now()
