"""One learner through one stream, and settings chosen on one data set and shown on another.

Which settings are best is never asked of the stream on which they are judged: :func:`search` looks
at one data set and says so, and :func:`evaluate` refuses that one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch

from ..core.errors import BurnishError, ConfigError
from ..core.recipe import parse
from .learner import Learner, Stored, Study, learner, said
from .metrics import Matrix
from .streams import Stream
from .training import Training, masked

#: rows that are answered at once
CHUNK = 256


@dataclass(frozen=True)
class Result:
    """What one run has come to. matrix: accuracies.  stored: after each task.  seconds: of training
    and of answering together."""

    stream: str
    scenario: str
    recipe: str
    learner: str
    seed: int
    matrix: Matrix
    stored: tuple[Stored, ...]
    trained: int
    seconds: float

    @property
    def added(self) -> tuple[int, ...]:
        """Numbers that each task has added to what is stored."""
        counts = [s.parameters for s in self.stored]
        return tuple(b - a for a, b in zip([0, *counts], counts, strict=False))

    def to_dict(self) -> dict[str, Any]:
        return {"stream": self.stream, "scenario": self.scenario, "recipe": self.recipe,
                "learner": self.learner, "seed": self.seed, **self.matrix.figures(),
                "accuracies": [list(r) for r in self.matrix.rows],
                "start": list(self.matrix.start), "test_rows": list(self.matrix.sizes),
                "parameters_added": list(self.added), "trained": self.trained,
                "bytes_stored": [s.bytes for s in self.stored],
                "samples_stored": [s.samples for s in self.stored], "seconds": self.seconds}


def run(stream: Stream, recipe: Any, how: str | Learner = "sequential", *,
        training: Training | None = None, seed: int = 0,
        tell: Callable[[str], None] = lambda line: None) -> Result:
    """Learn the tasks of a stream one after the other, and read the test rows after each.

    recipe: what ``burnish.tune`` takes.  how: a learner, or its expression.  training: default the
    stream's own.  seed: of the new head, the order of rows, and what recipe and learner draw; the
    global generators are left where they stand.  tell: is told each task's end.

    Raises ConfigError and RecipeError for what cannot be learnt so, before anything runs.
    """
    from ..fit.tasks import embedded

    embedded("image-classification", recipe)           # rows of a stream are told apart by class
    one = deepcopy(learner(how))
    study = Study(stream, parse(recipe), training or stream.training, seed)
    one.check(study)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        one.begin(study)
        trained = sum(p.numel() for p in one.tuned.parameters())
        matrix, stored = _through(stream, one, tell)
    return Result(stream.name, stream.scenario, str(study.recipe), said(one), seed, matrix,
                  tuple(stored), trained, time.perf_counter() - began)


def _through(stream: Stream, one: Learner, say: Callable[[str], None]
             ) -> tuple[Matrix, list[Stored]]:
    n = len(stream.tasks)
    blank: list[float | None] = [None] * n
    # the first task has no transfer from before it, and what cannot be answered yet has none at all
    start = [accuracy(stream, one, -1, j) if j and stream.scenario != "class" else None
             for j in range(n)]
    if one.whole:
        one.learn(n - 1)
        rows = [list(blank) for _ in range(n - 1)]
        rows.append([accuracy(stream, one, n - 1, j) for j in range(n)])
        return Matrix(rows, [len(t.test) for t in stream.tasks], start), [one.stored()]
    rows, stored = [], []
    for t in range(n):
        one.learn(t)
        # tasks ahead: the next alone, which forward transfer reads
        rows.append([accuracy(stream, one, t, j)
                     if j <= t or j == t + 1 and stream.answerable(t, j) else None
                     for j in range(n)])
        stored.append(one.stored())
        done = [v for v in rows[-1][:t + 1] if v is not None]
        say(f"task {t + 1} of {n}, {stream.tasks[t].name}: {100 * mean(done):.1f} % of what has "
            "been seen")
    return Matrix(rows, [len(t.test) for t in stream.tasks], start), stored


def accuracy(stream: Stream, one: Learner, t: int, j: int) -> float:
    """Of the test rows of task j after task t, among the classes that may be answered then."""
    task = j if stream.scenario == "task" else None
    allowed = stream.classes(t, task)
    test, right = stream.tasks[j].test, 0
    for i in range(0, len(test), CHUNK):
        rows = test[i:i + CHUNK]
        scores = one.scores(stream.collate([x for x, _ in rows]), allowed, task)
        found = masked(scores, allowed)
        if found.isnan().any():
            raise BurnishError(f"{said(one)} has scores that are no numbers after task {t + 1}")
        found = found.argmax(-1).cpu()
        right += int((found == torch.tensor([int(y) for _, y in rows])).sum())
    return right / len(test)


# -- settings chosen on one data set, shown on another ---------------------------------------------
@dataclass(frozen=True)
class Choice:
    """The best of some settings on a data set, and on which.

    value: (recipe, learner, training).  data, shape: of the stream that was looked at.  content:
    of its rows, for every seed.
    scores: mean last accuracy of each candidate, in the order they were given.
    """

    value: tuple[str, str, Training]
    data: str
    content: frozenset[int]
    shape: tuple[str, tuple[int, ...]]
    scores: tuple[float, ...] = field(default=())


def search(stream: Callable[[int], Stream], candidates: Iterable[tuple[str, str, Training]],
           seeds: Sequence[int] = (0, 1, 2)) -> Choice:
    """Which of (recipe, learner, training) has the best mean last accuracy over seeds; the first of
    those that are equal.

    stream: seed -> the stream, its classes (or domains) in an order of that seed. Its data set is
    spent: :func:`evaluate` refuses it.
    """
    made, some = [stream(s) for s in seeds], list(candidates)
    if not made or not some:
        raise ConfigError("settings are chosen among candidates, over seeds: neither may be empty")
    scores = [mean(run(one, recipe, how, training=training, seed=seed).matrix.last
                   for one, seed in zip(made, seeds, strict=True))
              for recipe, how, training in some]
    best = max(range(len(some)), key=lambda i: (scores[i], -i))
    return Choice(some[best], made[0].data, frozenset(one.content for one in made),
                  made[0].shape, tuple(scores))


def evaluate(choice: Choice, stream: Callable[[int], Stream], seeds: Sequence[int] = (0, 1, 2)
             ) -> list[Result]:
    """The chosen settings on another data set in the same scenario, a run per seed.

    Raises ConfigError for the data set the settings were chosen on, under whatever name, and for a
    stream of another scenario, number of tasks or classes per task.
    """
    made = [stream(s) for s in seeds]
    if not made:
        raise ConfigError("an evaluation has at least one seed")
    for one in made:
        if one.data == choice.data or one.content in choice.content:
            raise ConfigError(f"these settings were chosen on {choice.data}, so {one.name} cannot "
                              "say how good they are: evaluate on another data set")
        if one.shape != choice.shape:
            raise ConfigError(f"these settings were chosen on a stream of {_shape(choice.shape)}, "
                              f"and {one.name} is one of {_shape(one.shape)}: expected the same")
    recipe, how, training = choice.value
    return [run(one, recipe, how, training=training, seed=seed)
            for one, seed in zip(made, seeds, strict=True)]


def _shape(shape: tuple[str, tuple[int, ...]]) -> str:
    scenario, classes = shape
    return f"scenario {scenario!r}, {len(classes)} tasks of {', '.join(map(str, classes))} classes"
