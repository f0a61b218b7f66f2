"""What a stream of tasks has left: figures of a matrix of accuracies.

    a[t][j]   accuracy on the test rows of task j after training on task t   (t, j from 0 here)
    start[j]  the same before any training

An entry is None where nothing was measured: a class that has not come yet cannot be answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from ..core.errors import ConfigError

Row = Sequence[float | None]


@dataclass(frozen=True)
class Matrix:
    """rows: a, T of T entries; a row of None where nothing was read after that task.
    sizes: test rows of each task.  start: before any training."""

    rows: Sequence[Row]
    sizes: Sequence[int]
    start: Row

    def __post_init__(self) -> None:
        n = len(self.sizes)
        if n < 1 or len(self.rows) != n or len(self.start) != n \
                or any(len(r) != n for r in self.rows):
            raise ConfigError(f"accuracies of {n} tasks are {n} rows of {n} and a start of {n}, "
                              f"not {[len(r) for r in self.rows]} and {len(self.start)}")
        wrong = [v for r in (*self.rows, self.start) for v in r
                 if v is not None and not 0 <= v <= 1]
        if wrong:
            raise ConfigError(f"an accuracy is from 0 to 1, not {wrong[0]}")
        if any(v is None for v in self.rows[-1]):
            raise ConfigError("after the last task the rows of every task have to be read")

    @property
    def tasks(self) -> int:
        return len(self.sizes)

    def after(self, t: int) -> float | None:
        """A_t: accuracy on all test rows of tasks 0..t together, each row counting once."""
        seen = [(v, n) for v, n in zip(self.rows[t][:t + 1], self.sizes, strict=False)
                if v is not None]
        if len(seen) <= t:
            return None
        return sum(v * n for v, n in seen) / sum(n for _, n in seen)

    @property
    def last(self) -> float:
        """A_T: all test rows together, after the last task."""
        found = self.after(self.tasks - 1)
        assert found is not None
        return found

    @property
    def last_by_task(self) -> float:
        """The mean over tasks after the last: another figure where tasks differ in size."""
        return mean(v for v in self.rows[-1] if v is not None)

    @property
    def average(self) -> float | None:
        """Average incremental accuracy: mean_t A_t."""
        found = [self.after(t) for t in range(self.tasks)]
        return None if any(v is None for v in found) else mean(v for v in found if v is not None)

    @property
    def forgetting(self) -> float | None:
        """mean over j < T of (the best of a[l][j], j <= l < T, less a[T][j])."""
        return self._mean([None if any(r[j] is None for r in self.rows[j:-1]) else
                           max(r[j] for r in self.rows[j:-1]) - self._end(j)  # type: ignore
                           for j in range(self.tasks - 1)])

    @property
    def backward(self) -> float | None:
        """Backward transfer: mean over j < T of a[T][j] - a[j][j]."""
        return self._mean([None if (v := self.rows[j][j]) is None else self._end(j) - v
                           for j in range(self.tasks - 1)])

    @property
    def forward(self) -> float | None:
        """Forward transfer: mean over j > 1 of a[j - 1][j] - start[j]. None where tasks that have
        not come cannot be answered (classes that nobody has seen)."""
        pairs = [(self.rows[j - 1][j], self.start[j]) for j in range(1, self.tasks)]
        return self._mean([None if a is None or s is None else a - s for a, s in pairs])

    @property
    def drop(self) -> float | None:
        """A of the first task less A of the last (few-shot streams call it PD)."""
        first = self.after(0)
        return None if first is None or self.tasks < 2 else first - self.last

    def figures(self) -> dict[str, float | None]:
        return {"last": self.last, "last_by_task": self.last_by_task, "average": self.average,
                "forgetting": self.forgetting, "backward": self.backward,
                "forward": self.forward, "drop": self.drop}

    def _end(self, j: int) -> float:
        value = self.rows[-1][j]
        assert value is not None
        return value

    @staticmethod
    def _mean(values: Sequence[float | None]) -> float | None:
        return None if not values or any(v is None for v in values) else \
            mean(v for v in values if v is not None)
