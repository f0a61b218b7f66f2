"""A run in stages: a trainer for each, and one count of steps, one folder, one history for all.

    legs = plan(tuned, tasks, arguments, args)
    for each: begin -> train (from a checkpoint, where the run goes on in it) -> then

A recipe that is not in stages is a run of one leg. Checkpoints and metrics count steps over the
whole run; each holds what the legs before it have left (:class:`Past`), so that a run killed in one
stage goes on in that stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, FormatError, RecipeError
from ..core.recipe import Recipe, joins
from ..core.stage import Stage, label, shares
from ..engine.adapters import check_name
from ..engine.stages import begin, divides, stages_of
from ..engine.tuned import Tuned
from .state import load_tree
from .tasks import Task


@dataclass
class Leg:
    """One stretch of a run: a stage of the recipe, or the whole run where it has none.

    name: "2/3 other"; number: from 0; steps: updates (None: as the arguments say); before: updates
    of the legs before it; total: of the whole run.
    """

    task: Task
    stage: Stage | None = None
    name: str = ""
    number: int = 0
    steps: int | None = None
    before: int = 0
    total: int | None = None

    def begin(self, tuned: Tuned, calibration: Callable[[Task], Iterator[Any]]) -> None:
        """Who trains and who is active; a new adapter reads this leg's own data first."""
        if self.stage is not None:
            begin(tuned, self.stage, calibration=calibration(self.task))

    def end(self, tuned: Tuned) -> None:
        if self.stage is not None and self.stage.then is not None:
            self.stage.then(tuned)

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The run's settings for this leg alone; who counts in epochs saves by them too."""
        if self.steps is None:
            return dict(args)
        own = {k: v for k, v in args.items() if k != "num_train_epochs"} | {"max_steps": self.steps}
        if args.get("max_steps", 0) > 0:
            return own
        evaluates = "epoch" if self.task.data.validation is not None else "no"
        return {"save_strategy": "epoch", "eval_strategy": evaluates, **own}


@dataclass
class Past:
    """What the legs that are over have left: seconds, logs, what is told of each, and the memory
    measured in the dearest."""

    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, Any] | None = None

    def kept(self) -> dict[str, Any]:
        return asdict(self)


def tasks_of(data: Any) -> dict[str, Any]:
    """name -> data, where several data sets are given by name; ``{"": data}`` for one.

    Raises ConfigError for a list, and for names that adapters cannot have.
    """
    if type(data).__module__.partition(".")[0] == "datasets" or not isinstance(
            data, list | tuple | Mapping):
        return {"": data}
    if not isinstance(data, Mapping):
        raise ConfigError("several data sets are tasks, one after the other, and each has a name: "
                          "{'first': 'a.csv', 'second': 'b.csv'}")
    if not data:
        raise ConfigError("an empty mapping names no data set")
    taken: dict[str, Any] = {}
    for name, where in data.items():
        check_name(str(name), taken)
        taken[str(name)] = where
    return taken


def check_tasks(tasks: Mapping[str, Any], recipe: Recipe | None) -> None:
    """Raises ConfigError where nothing says how several tasks are trained one after the other, and
    RecipeError where nothing of the recipe joins to a model, or a part takes
    several samples for one thing."""
    if recipe is not None:
        joins(recipe)
        for part in recipe:
            if (n := part.together()) > 1:
                raise RecipeError(f"{part.name} takes {n} consecutive samples for one thing, and "
                                  "fit draws each by itself; expected a loop of your own with "
                                  "tuned.step")
    if "" in tasks or recipe is not None and divides(recipe):
        return
    told = f"{recipe} trains in one stretch" if recipe is not None else "there is no recipe"
    raise ConfigError(f"{told}, and the data are tasks by name ({', '.join(tasks)}): a recipe "
                      "with a part such as o_lora trains one after the other, "
                      "'lora(rank=8) + o_lora'")


def plan(tuned: Tuned, tasks: Mapping[str, Task], arguments: Any, args: Mapping[str, Any]
         ) -> list[Leg]:
    """The legs of a run. arguments: transformers', args: those that were given.

    ``max_steps`` is of the whole run. Raises ConfigError where it is too little for the stages.
    """
    names = [n for n in tasks if n]
    stages = stages_of(tuned, names)
    first = next(iter(tasks.values()))
    if not stages:
        return [Leg(first)]
    if len(tasks) > 1 and (bare := next((s for s in stages if s.data is None), None)):
        raise ConfigError(f"a stage of {bare.trains!r} trains on all the data, and there are "
                          f"{len(tasks)} data sets: give one")
    of = [tasks[s.data] if s.data is not None else first for s in stages]
    sizes = [updates(t, arguments) for t in of]
    asked = int(args.get("max_steps", 0))
    if asked > 0:
        total = asked
    elif all(isinstance(s.until, int) for s in stages):
        total = sum(int(s.until or 0) for s in stages)
    else:
        each = {id(t): n for t, n in zip(of, sizes, strict=True)}
        total = sum(math.ceil(float(arguments.num_train_epochs) * n) for n in each.values())
    legs, before = [], 0
    for i, steps in enumerate(shares(stages, total, sizes)):
        legs.append(Leg(of[i], stages[i], label(stages, i), i, steps, before, total))
        before += steps
    return legs


def idle(tuned: Tuned, tasks: Mapping[str, Task]) -> str:
    """A note of a part that has nothing to do, for there is one task."""
    part = divides(tuned.recipe)
    if part is None or len(tasks) > 1 or stages_of(tuned, ()):
        return ""
    return (f"{part.name} is for tasks one after the other, and with one data set there is nothing "
            "for it to do; several are given by name, {'first': 'a.csv', 'second': 'b.csv'}, or "
            "--data first=a.csv --data second=b.csv")


def updates(task: Task, arguments: Any) -> int:
    """Updates of one epoch of a task's training rows."""
    rows, per = len(task.rows("train")), arguments.train_batch_size * arguments.world_size
    batches = max(1, rows // per if arguments.dataloader_drop_last else -(-rows // per))
    return -(-batches // arguments.gradient_accumulation_steps)


def left_by(checkpoint: Path | None, legs: list[Leg]) -> tuple[int, Past]:
    """(number of the leg that a checkpoint goes on in, what lies behind it).

    Raises FormatError where the run it belongs to was divided otherwise.
    """
    if checkpoint is None:
        return 0, Past()
    kept = load_tree(checkpoint, "loop")
    number, past = int(kept.get("stage", 0)), Past(**kept.get("past", {}))
    then, now = [tuple(s) for s in kept.get("stages", ())], told(legs)
    same = [n for n, _ in then] == [n for n, _ in now] and then[:number] == now[:number]
    if not same:
        raise FormatError(f"{checkpoint} belongs to another run: its stages are {_said(then)}, "
                          f"this run's are {_said(now)}")
    return number, past


def told(legs: list[Leg]) -> list[tuple[str, int]]:
    """(name, updates) of each stage."""
    return [(leg.name, int(leg.steps or 0)) for leg in legs if leg.stage is not None]


def _said(stages: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {steps} updates" for name, steps in stages) or "none"


def facts_of(leg: Leg, tuned: Tuned, state: Any, rate: float, seconds: float) -> dict[str, Any]:
    """What is told of a leg that is over."""
    assert leg.stage is not None
    shown = [h for h in state.log_history if "eval_loss" in h]
    best = next((h for h in shown if h["step"] == state.best_global_step), shown[-1] if shown
                else {})
    skip = ("runtime", "per_second", "preparation_time")
    return {
        "stage": leg.name, "trains": leg.stage.trains, "recipe": str(tuned.recipe),
        "data": leg.task.data.source, "beside": dict(leg.stage.beside),
        "first": leg.before + 1, "steps": leg.steps, "learning_rate": rate,
        "trainable": sum(p.numel() for p in tuned.parameters()), "seconds": seconds,
        "kept": leg.before + int(best.get("step", leg.steps or 0)),
        "metrics": {k.removeprefix("eval_"): v for k, v in best.items()
                    if k.startswith("eval_") and not k.endswith(skip)},
    }
