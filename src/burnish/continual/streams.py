"""A stream: tasks in an order, the model that meets them, and what may be answered when.

    class     tasks have classes of their own; an answer is one of all classes seen so far
    task      the same tasks, and each row says which it is of: an answer is one of that task's
    domain    the same classes in every task, of rows that differ

Accuracies of rows that say their task and of rows that do not are never put side by side: a stream
is one or the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError
from .training import Training

Scenario = Literal["class", "domain", "task"]
SCENARIOS: tuple[Scenario, ...] = ("class", "domain", "task")
#: (what `collate` reads, its class)
Row = tuple[Any, int]


def logits_of(out: Any) -> Tensor:
    """What a model answers, (rows, classes)."""
    for name in ("logits", "scores"):
        found = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(out, Tensor):
        return out
    raise ConfigError(f"the model returned a {type(out).__name__} without logits; give "
                      "Stream(logits=...), which reads them off what it returns")


@dataclass(frozen=True)
class Task:
    """name: for people.  classes: those of its rows.  train, test: rows."""

    name: str
    classes: tuple[int, ...]
    train: Sequence[Row]
    test: Sequence[Row]

    def __post_init__(self) -> None:
        for what, rows in (("train", self.train), ("test", self.test)):
            if not len(rows):
                raise DataError(f"task {self.name!r} has no rows to {what}")
            if strange := {int(y) for _, y in rows} - set(self.classes):
                raise DataError(f"task {self.name!r} has {what} rows of class {min(strange)}, and "
                                f"its classes are {', '.join(map(str, self.classes))}")


@dataclass(frozen=True)
class Stream:
    """name: of this stream.  data: of the data set, which settings are chosen on or shown on, never
    both.  model: makes the pre-trained model, with a head of `width` classes; it is drawn from the
    run's seed.  collate: rows' first entries -> what the model is called with (a tensor, or a
    mapping).  logits: read off what the model returns.  targets, head: for ``burnish.tune``.
    training: what a run takes where it is told nothing else.
    """

    name: str
    data: str
    scenario: Scenario
    tasks: tuple[Task, ...]
    model: Callable[[], nn.Module]
    collate: Callable[[Sequence[Any]], Any]
    logits: Callable[[Any], Tensor] = logits_of
    targets: Any = None
    head: bool | str = "auto"
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ConfigError(f"a stream is of 'class', 'domain' or 'task', not {self.scenario!r}")
        if len(self.tasks) < 2:
            raise ConfigError(f"{self.name}: a stream has two tasks or more, this one has "
                              f"{len(self.tasks)}")
        seen: dict[int, str] = {}
        for task in self.tasks:
            if self.scenario == "domain":
                if set(task.classes) != set(self.tasks[0].classes):
                    raise ConfigError(f"{self.name}: domains have the same classes, and "
                                      f"{task.name!r} has others than {self.tasks[0].name!r}")
                continue
            for c in task.classes:
                if c in seen:
                    raise ConfigError(f"{self.name}: class {c} is of {seen[c]!r} and of "
                                      f"{task.name!r}; tasks have classes of their own, or the "
                                      "stream is one of domains")
                seen[c] = task.name

    @property
    def width(self) -> int:
        """Classes the head has."""
        return 1 + max(c for t in self.tasks for c in t.classes)

    @property
    def shape(self) -> tuple[str, tuple[int, ...]]:
        """The scenario, and how many classes each task brings: streams on which the same settings
        may be judged have this in common."""
        return self.scenario, tuple(len(t.classes) for t in self.tasks)

    @property
    def content(self) -> int:
        """A checksum of what the test rows are, in whatever order tasks come and whatever classes
        are called: data by another name are found."""
        rows = sorted(zlib.crc32(repr(_told(x)).encode()) for t in self.tasks for x, _ in t.test)
        return zlib.crc32(repr(rows).encode())

    def classes(self, t: int, task: int | None = None) -> Tensor:
        """(width,) bool: what may be answered after the first t + 1 tasks; `task`: by a row that
        says it is of that one."""
        own = [self.tasks[task]] if self.scenario == "task" and task is not None else \
            self.tasks if self.scenario == "domain" else self.tasks[:t + 1]
        out = torch.zeros(self.width, dtype=torch.bool)
        out[[c for k in own for c in k.classes]] = True
        return out

    def mine(self, labels: Tensor, t: int) -> Tensor:
        """(rows, width) bool: the classes of each row's own task. Task t's where labels do not tell
        (domains)."""
        if self.scenario == "domain":
            return self.classes(t).expand(len(labels), -1)
        of = torch.zeros(self.width, self.width, dtype=torch.bool)
        for task in self.tasks:
            for c in task.classes:
                of[c, list(task.classes)] = True
        return of[labels.cpu()]

    def answerable(self, t: int, j: int) -> bool:
        """Can rows of task j be answered after task t?"""
        return j <= t or self.scenario != "class"


def permuted(n: int, order: int) -> list[int]:
    """0 to n - 1 in the order of a seed, by the generator whose 1993 is the custom."""
    import numpy as np

    if not 0 <= order < 2**32:
        raise ConfigError(f"order={order}: expected a seed from 0 to 2^32 - 1")
    return [int(i) for i in np.random.RandomState(order).permutation(n)]


def _told(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.tolist()
    if isinstance(x, Mapping):
        return sorted((k, _told(v)) for k, v in x.items() if k != "labels")
    return x.tolist() if hasattr(x, "tolist") else x


def by_class(train: Sequence[Row], test: Sequence[Row], *, base: int = 0, increment: int = 2,
             order: int | None = 1993) -> tuple[Task, ...]:
    """Tasks of classes: `base` in the first (0: as many as in the others), then `increment` each
    (B0-Inc2, B50-Inc5 of the literature).

    order: seed of the classes' order, numpy's ``RandomState(order).permutation``, 1993 by custom;
    None: as they are numbered. Raises ConfigError where the classes do not come out even.
    """
    known = sorted({int(y) for _, y in train})
    n, first = len(known), base or increment
    if increment < 1 or base < 0 or first >= n or (n - first) % increment:
        raise ConfigError(f"{n} classes do not fall into a task of {first} and others of "
                          f"{increment}")
    if order is not None:
        known = [known[i] for i in permuted(n, order)]
    cuts = [0, *range(first, n + 1, increment)]
    return tuple(_task(" ".join(map(str, some)), some, train, test)
                 for some in (known[a:b] for a, b in zip(cuts, cuts[1:], strict=False)))


def _task(name: str, classes: Sequence[int], train: Sequence[Row], test: Sequence[Row]) -> Task:
    return Task(name, tuple(classes), [r for r in train if r[1] in classes],
                [r for r in test if r[1] in classes])


def by_domain(rows: Mapping[str, tuple[Sequence[Row], Sequence[Row]]], *, order: int | None = None
              ) -> tuple[Task, ...]:
    """Tasks of domains: name -> (rows to train, rows to test). order: seed of their order."""
    names = list(rows)
    if order is not None:
        names = [names[i] for i in permuted(len(names), order)]
    classes = tuple(sorted({int(y) for part in rows.values() for r in part for _, y in r}))
    return tuple(Task(n, classes, *rows[n]) for n in names)
