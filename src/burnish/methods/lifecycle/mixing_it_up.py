from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from ...blocks.choose.cocktail import Cocktail, shares, without
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import untargeted


@dataclass(frozen=True)
class Report:
    """What one target gained by what it was mixed with.

    figures: mixture -> task -> figure, higher is better; the first mixture is the target alone.
    rows: mixture -> data set -> rows trained on.  left_out: data set -> rows of it that are held
    out somewhere, and were not trained on.
    """

    target: str
    figures: dict[str, dict[str, float]]
    rows: dict[str, dict[str, int]]
    left_out: dict[str, int]

    @property
    def best(self) -> str:
        """The mixture with the target's highest figure."""
        return max(self.figures, key=lambda m: self.figures[m][self.target])

    def gain(self, mixture: str) -> float:
        """Of the target, over the target alone."""
        return self.figures[mixture][self.target] - self.figures[self.target][self.target]

    def __str__(self) -> str:
        tasks = list(next(iter(self.figures.values())))
        wide = max(len(m) for m in self.figures)
        head = "  ".join([f"{'':{wide}}", *(f"{t:>10}" for t in tasks), f"{'gain':>8}"])
        lines = ["  ".join([f"{m:{wide}}", *(f"{of[t]:>10.4f}" for t in tasks),
                            f"{self.gain(m):>+8.4f}"]) for m, of in self.figures.items()]
        return "\n".join([head, *lines])


@dataclass(frozen=True, kw_only=True)
class MixingItUp(Method):
    """Mixing It Up: a target task is trained beside related ones, and which is found by trying.

    For a target t: t alone, t with each related set, all of them, all with general instructions,
    all with mathematics; one model each, the ordinary loss, and figures of every task, never only
    their mean. ``sampling="union"`` puts the sets behind each other and shuffles, each row once a
    pass (as published); "size" draws sets in proportion to ``rows^(1 / temperature)``, "weights" by
    the weights given. The order is the seed's and goes on where it was (``Cocktail.state_dict``)::

        method = burnish.parse("mixing_it_up")[0]
        report = method.lifecycle(data, "fiqa", train, score, held=held, general="dolly",
                                  math="orca")
        rows = method.rows(data, 10_000)                 # one mixture, for burnish.fit

    Rows of a training set that stand among the held-out rows of any task are left out and counted.
    Answers alone are learnt where a template says so, which is `fit`'s. The host trains what it
    trains; nothing here does. (Proportions and rates of the paper are unconfirmed.)
    """

    paper: ClassVar[str] = ("Mixing It Up: The Cocktail Effect of Multi-Task Fine-Tuning on LLM "
                            "Performance (2024), arXiv:2410.01109")

    sampling: str = setting("union", "which set comes next: union, size or weights",
                            other=("size",))
    temperature: float = setting(1.0, "T: sets are drawn by rows^(1 / T)",
                                 beside={"sampling": "size"})
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        if self.sampling not in ("union", "size", "weights"):
            raise ConfigError(f"mixing_it_up(sampling={self.sampling!r}): expected union, size or "
                              "weights")
        if self.temperature <= 0:
            raise ConfigError(f"mixing_it_up: a temperature above 0 is expected, not "
                              f"{self.temperature:g}")
        if self.temperature != 1 and self.sampling != "size":
            raise ConfigError(f"mixing_it_up: a temperature does nothing beside sampling="
                              f"{self.sampling!r}")
        untargeted(self, "it chooses data")

    def stream(self, sizes: Mapping[str, int], weights: Mapping[str, float] | None = None
               ) -> Cocktail:
        """(name, number of a row), without an end."""
        if (weights is not None) != (self.sampling == "weights"):
            raise ConfigError("mixing_it_up: weights and sampling='weights' go together")
        share = None if self.sampling == "union" else shares(sizes, weights, self.temperature)
        return Cocktail(sizes, share, self.seed)

    def rows(self, data: Mapping[str, Sequence[Any]], count: int | None = None,
             weights: Mapping[str, float] | None = None) -> list[Any]:
        """So many rows of the mixture in order; None: as many as there are."""
        drawn = self.stream({k: len(v) for k, v in data.items()}, weights)
        n = sum(map(len, data.values())) if count is None else count
        return [data[name][i] for name, i in islice(drawn, n)]

    def mixtures(self, names: Sequence[str], target: str, general: str | None = None,
                 math: str | None = None) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(what it is called, the data sets) of every comparison, the target alone first."""
        for name in filter(None, (target, general, math)):
            if name not in names:
                raise ConfigError(f"mixing_it_up: no data set {name!r} (there is "
                                  f"{', '.join(names)})")
        related = [n for n in names if n not in (target, general, math)]
        tasks = (target, *related)
        yield target, (target,)
        for name in related if len(related) > 1 else ():
            yield f"{target} + {name}", (target, name)
        if related:
            yield "all", tasks
        for more in filter(None, (general, math)):
            yield f"{'all' if related else target} + {more}", (*tasks, more)

    def lifecycle(self, data: Mapping[str, Sequence[Any]], target: str,
                  train: Callable[[list[Any]], Any],
                  score: Callable[[Any, str, Sequence[Any]], float], *,
                  held: Mapping[str, Sequence[Any]], general: str | None = None,
                  math: str | None = None, count: int | None = None,
                  weights: Mapping[str, float] | None = None) -> Report:
        """Train a model on each mixture and compare them on the held-out rows of every task.

        train(rows) -> a model tuned on them, from the same start each time.  score(model, task,
        held-out rows) -> its figure, higher is better.  count: rows of a mixture; None: all.
        """
        if target not in held:
            raise ConfigError(f"mixing_it_up: held-out rows of {target!r} are what is compared")
        known = [r for rows in held.values() for r in rows]
        clean = {name: without(rows, known) for name, rows in data.items()}
        if empty := [n for n, rows in clean.items() if not rows]:
            raise ConfigError(f"mixing_it_up: every row of {empty[0]!r} is held out")
        out = Report(target, {}, {}, {n: len(rows) - len(clean[n]) for n, rows in data.items()})
        for name, parts in self.mixtures(list(data), target, general, math):
            some = {n: clean[n] for n in parts}
            share = None if weights is None else {n: weights[n] for n in parts}
            drawn = self.stream({n: len(v) for n, v in some.items()}, share)
            total = sum(map(len, some.values())) if count is None else count
            taken = list(islice(drawn, total))
            model = train([some[n][i] for n, i in taken])
            out.figures[name] = {task: float(score(model, task, rows))
                                 for task, rows in held.items()}
            out.rows[name] = {n: sum(m == n for m, _ in taken) for n in parts}
        return out
