"""Recipes and learners on one stream, in one table, beside what they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from ..core.errors import BurnishError, CheckError, ConfigError, RecipeError, TargetError
from ..core.method import Method
from ..core.recipe import parse
from . import real
from .harness import Result, run
from .learner import Learner, learner, said
from .streams import Scenario, Stream
from .training import Training

#: what every recipe is learnt by for comparison, and the recipe that is held beside all
BASELINES, PROBE = ("joint", "sequential", "replay"), "linear_probe"

COLUMNS = ("recipe", "learner", "last", "average", "forgetting", "backward", "forward", "trained",
           "a task adds", "stored", "rows", "seconds")
#: what an answer is among, by scenario
AMONG = {"class": "all classes seen so far, rows do not say their task",
         "task": "the classes of the row's own task, which it says",
         "domain": "the same classes in every task"}


@dataclass(frozen=True)
class Line:
    """One recipe under one learner: its runs, a seed each, or why it is refused."""

    recipe: str
    learner: str
    results: tuple[Result, ...] = ()
    refused: str = ""

    def figures(self, name: str) -> list[float]:
        """A figure of every run; empty where it has no meaning."""
        found = [r.matrix.figures()[name] for r in self.results]
        return [] if any(v is None for v in found) else [v for v in found if v is not None]

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"recipe": self.recipe, "learner": self.learner}
        if self.refused:
            return {**out, "refused": self.refused}
        for name in self.results[0].matrix.figures():
            values = self.figures(name)
            out[name] = None if not values else \
                {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}
        return {**out, "runs": [r.to_dict() for r in self.results]}

    def cells(self) -> list[str]:
        if self.refused:
            return [self.recipe, self.learner, "refused", *[""] * (len(COLUMNS) - 3)]
        some, last = self.results[0], self.results[0].stored[-1]
        steps = some.added[1:]
        return [self.recipe, self.learner,
                *[percent(self.figures(n), signed=n in ("backward", "forward"))
                  for n in ("last", "average", "forgetting", "backward", "forward")],
                f"{some.trained:,}", f"{max(steps):,}" if steps else "",
                size(last.bytes), f"{last.samples:,}",
                f"{mean(r.seconds for r in self.results):.0f}"]


@dataclass(frozen=True)
class Report:
    """stream, scenario: which.  tasks: names of the tasks, of the first seed.  lines: as asked."""

    stream: str
    scenario: Scenario
    tasks: tuple[str, ...]
    training: Training
    seeds: tuple[int, ...]
    lines: tuple[Line, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"stream": self.stream, "scenario": self.scenario, "tasks": list(self.tasks),
                "training": vars(self.training), "seeds": list(self.seeds),
                "rows": [line.to_dict() for line in self.lines]}

    def head(self) -> str:
        t = self.training
        return (f"{self.stream}: {len(self.tasks)} tasks ({', '.join(self.tasks)}), answers among "
                f"{AMONG[self.scenario]}; {t.epochs} epochs of batches of {t.batch}, rate "
                f"{t.rate:g}, {_seeds(self.seeds)}")

    def notes(self) -> list[str]:
        """What the figures are, and what was refused."""
        out = ["per cent of test rows. last: after the last task; average: over tasks as they "
               "come; forgetting: best less last of each task; backward and forward: transfer to "
               "tasks past and ahead. stored: bytes beside the pre-trained model, with rows of "
               "the past."]
        return out + [f"{x.recipe} under {x.learner} is refused: {x.refused}"
                      for x in self.lines if x.refused]

    def __str__(self) -> str:
        cells = [list(COLUMNS), *[x.cells() for x in self.lines]]
        widths = [max(len(r[i]) for r in cells) for i in range(len(COLUMNS))]
        shown = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w)
                           for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
                 for r in cells]
        shown.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.head(), "", *shown, "", *self.notes()])

    def page(self) -> str:
        """The same as a part of a page in Markdown."""
        rows = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
                *["| " + " | ".join([f"`{c[0]}`", f"`{c[1]}`", *c[2:]]) + " |"
                  for c in (x.cells() for x in self.lines)]]
        return "\n".join([f"## {self.stream}", "", f"{self.head()}.", "", *rows, "",
                          *self.notes(), ""])


def compare(stream: str | Stream | Callable[[int], Stream],
            recipes: str | Method | Iterable[str | Method], *,
            learners: Sequence[str | Learner] = (), seeds: int | Sequence[int] = 1,
            scenario: Scenario | None = None, baselines: bool = True,
            training: Training | None = None, say: Callable[[str], None] = lambda line: None
            ) -> Report:
    """Learn a stream of tasks with each recipe under each learner.

    stream: "digits", "text" or "tables"; a :class:`~burnish.continual.Stream` of your own model and
        rows; or a function from a seed to one, whose tasks come in an order of that seed.
    recipes: one or several, each what ``burnish.tune`` takes.
    learners: beside the baselines, names or expressions (``"lae(ema=0.999)"``), or learners.
    seeds: how many, or which: of the order of tasks, rows, head, and of what is drawn.
    scenario: of a named stream, "class", "task" or "domain"; default its own.
    baselines: every recipe on all tasks at once (joint), with nothing against forgetting
        (sequential) and beside a memory of 100 rows (replay); and a linear probe.
    training: epochs, batch, rates; default the stream's own, which were chosen on none of them.
    say: is told what is done.

    Raises ConfigError for names that are none, and where every row is refused.
    """
    which = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not which or isinstance(seeds, bool):
        raise ConfigError(f"seeds={seeds!r}: expected how many, or which")
    asked = [recipes] if isinstance(recipes, str | Method) else list(recipes)
    if not asked:
        raise ConfigError("a stream is learnt with a recipe, e.g. 'lora(rank=4)'")
    made = _streams(stream, scenario, which)
    hows = list(dict.fromkeys([*(BASELINES if baselines else ()), *learners])) or ["sequential"]
    pairs = [(parse(r), learner(h)) for r in asked for h in hows]
    if baselines and PROBE not in {str(r) for r, _ in pairs}:
        pairs.append((parse(PROBE), learner("sequential")))
    lines = []
    for recipe, how in pairs:
        line = _line(made, recipe, how, training, which, say)
        lines.append(line)
        say(f"{line.recipe}, {line.learner}: " + (
            f"refused, {line.refused}" if line.refused else
            f"{percent(line.figures('last'))} % after the last task"))
    if all(x.refused for x in lines):
        raise ConfigError(f"nothing could be learnt: {lines[0].refused}")
    first = made[0]
    return Report(first.name, first.scenario, tuple(t.name for t in first.tasks),
                  training or first.training, which, tuple(lines))


def _line(made: Sequence[Stream], recipe: Any, how: Learner, training: Training | None,
          seeds: Sequence[int], say: Callable[[str], None]) -> Line:
    try:
        return Line(str(recipe), said(how), tuple(
            run(one, recipe, how, training=training, seed=seed, tell=say)
            for one, seed in zip(made, seeds, strict=True)))
    except (RecipeError, TargetError, CheckError) as why:          # this one alone
        return Line(str(recipe), said(how), refused=str(why))
    except BurnishError as why:
        if type(why) is not BurnishError:            # the call was wrong, for all of them
            raise
        return Line(str(recipe), said(how), refused=str(why))      # a loss that is not finite
    except Exception as why:                         # those that are done are not lost
        return Line(str(recipe), said(how), refused=f"{type(why).__name__}: {why}")


def _streams(stream: Any, scenario: Scenario | None, seeds: Sequence[int]) -> list[Stream]:
    if isinstance(stream, str):
        made = real.named(stream, scenario)
    elif scenario is not None:
        raise ConfigError("scenario= is of a named stream; a stream of your own says its own")
    elif isinstance(stream, Stream):
        return [stream] * len(seeds)
    elif callable(stream):
        made = stream
    else:
        raise ConfigError(f"a stream is a name, a burnish.continual.Stream or a function that "
                          f"makes one, not a {type(stream).__name__}")
    return [made(s) for s in seeds]


def percent(values: Sequence[float], signed: bool = False) -> str:
    """Mean and, of several, their standard deviation, in per cent."""
    if not values:
        return "-"
    sign = "+" if signed else ""
    middle = f"{100 * mean(values):{sign}.1f}"
    return middle if len(values) < 2 else f"{middle} ± {100 * stdev(values):.1f}"


def size(count: int) -> str:
    return f"{count / 1024:.0f} KiB" if count < 10 * 2**20 else f"{count / 2**20:.0f} MiB"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
