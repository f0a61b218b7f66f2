"""How a stream is learnt: a learner has a recipe trained on each task, and answers.

A learner is a file ``continual/learners/<name>.py`` with one dataclass of its settings; the file's
name is its name in expressions, ``lae(ema=0.999)``. A run takes a copy of it, so one object may be
run with many seeds.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import recipe as recipes
from ..core.batches import call, moved
from ..core.errors import ConfigError, RecipeError, nearest
from ..core.recipe import Recipe
from ..engine.stages import divides, stages_of
from ..engine.tune import tune
from .streams import Row, Stream
from .training import Given, Training, cross_entropy, teach

if TYPE_CHECKING:
    from ..core.stage import Stage
    from ..engine.tuned import Tuned


class Stored(NamedTuple):
    """What has to be kept, beside the pre-trained model, to go on and to answer.

    parameters: numbers (adapters, changed weights of the base, copies, statistics).  bytes: of
    those and of samples kept.  samples: rows of the past.
    """

    parameters: int
    bytes: int
    samples: int


@dataclass(frozen=True)
class Study:
    """What a run gives its learner."""

    stream: Stream
    recipe: Recipe
    training: Training
    seed: int

    @property
    def names(self) -> list[str]:
        """Of the tasks, as adapters may be called."""
        return [f"task{t + 1}" for t in range(len(self.stream.tasks))]


#: keys of context that a run knows of each row
KEYS = ("task", "replay")


@dataclass
class Learner:
    """Base of every learner: one model with the recipe joined to it, trained on a task after the
    other. What others do differently they override.

    name: of its file.  paper: the source.  whole: it is given all tasks at once.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    whole: ClassVar[bool] = False

    def check(self, study: Study) -> None:
        """Refuse, before anything is made, what cannot be learnt so."""
        read = {k: m.name for m in study.recipe for k, key in m.context.items()
                if not key.optional}
        for key, part in read.items():
            if key not in KEYS:
                raise RecipeError(f"{part} reads {key!r} of the batch, and a stream of tasks has "
                                  f"{' and '.join(KEYS)} alone")
            if key == "task" and study.stream.scenario != "task":
                raise RecipeError(f"{part} asks each row for its task, which rows of "
                                  f"{study.stream.name} do not say: a stream of scenario 'task'")

    def begin(self, study: Study) -> None:
        """A fresh model with the recipe joined to it, and nothing learnt."""
        self.study = study
        self.keys = sorted({k for m in study.recipe for k in m.context})
        self.tuned = self.joined()
        self.head = self.tensors_of_head(self.tuned)

    def learn(self, t: int) -> None:
        """Train on task t, which is all that is at hand."""
        raise NotImplementedError

    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        """(rows, width), the largest of those allowed is the answer. task: of the rows, where they
        say it."""
        return self.logits(inputs, task)

    def stored(self) -> Stored:
        return count(self.held().values())

    # -- for those that override --------------------------------------------------------------
    def joined(self, name: str = "default", head: bool | str | None = None) -> Tuned:
        """A fresh model with the recipe joined to it under a name; head=None: the stream's."""
        study, model = self.study, self.study.stream.model()
        self.device = next(model.parameters()).device
        return tune(model, study.recipe, targets=study.stream.targets,
                    head=study.stream.head if head is None else head,
                    calibration=self.reads(study.stream.tasks[0].train), seed=study.seed, name=name)

    def reads(self, rows: Sequence[Row], batches: int = 4) -> list[Any]:
        """The first batches of rows, for parts that read data before they start."""
        n = self.study.training.batch
        return [self._reads(list(rows[i:i + n]))
                for i in range(0, min(len(rows), batches * n), n)]

    @staticmethod
    def tensors_of_head(tuned: Tuned) -> frozenset[str]:
        """Names of the parameters of the task head."""
        return frozenset(f"{path}.{leaf}" for path in tuned.anatomy.head for leaf, _ in
                         tuned.model.get_submodule(path).named_parameters()
                         if ".burnish." not in f".{leaf}")

    def _reads(self, rows: list[Row]) -> Any:
        """A batch for parts that read data before they start."""
        given = Learner.given(self, rows, 0)     # before there is a past
        return {**given.inputs, "labels": given.labels} if isinstance(given.inputs, dict) else \
            (given.inputs, given.labels)

    def given(self, rows: list[Row], t: int, replayed: int = 0) -> Given:
        """A step of rows of task t, of which the last `replayed` are of the past."""
        labels = torch.tensor([int(y) for _, y in rows])
        of = {c: k for k, task in enumerate(self.study.stream.tasks) for c in task.classes}
        n = len(rows) - replayed
        keys = {"replay": torch.tensor([0] * n + [1] * replayed),
                "task": torch.tensor([of[int(y)] for y in labels])}
        inputs = self.study.stream.collate([x for x, _ in rows])
        return Given(*moved((inputs, labels, keys), self.device))

    current: ClassVar[bool] = False                  # among classes of a row's own task alone

    def allowed(self, given: Given, t: int) -> Tensor:
        """Among which classes a row is trained: those of its own task where rows say their task,
        or `current`; else all that have been seen."""
        stream = self.study.stream
        return stream.mine(given.labels, t) if self.current or stream.scenario == "task" else \
            stream.classes(t)

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        """What a step on task t minimises."""
        return cross_entropy(z, given.labels, self.allowed(given, t))

    def teach(self, rows: Sequence[Row], t: int,
              step: Callable[[list[Row], int], Given] | None = None, **how: Any) -> None:
        """The loop of training.py over rows of task t."""
        study, made = self.study, step or self.given
        teach(self.tuned, study.training, lambda some: made(some, t), study.stream.logits,
              lambda z, given: self.loss(z, given, t), rows, study.seed * 101 + t,
              head=sorted(self.head), keys=self.keys, **how)

    def stages(self) -> list[Stage]:
        """Of a recipe whose part divides a run over tasks (o_lora); none of others."""
        if divides(self.study.recipe) is None:
            return []
        stages = stages_of(self.tuned, self.study.names)
        if [s.data for s in stages] != self.study.names or any(s.until for s in stages):
            raise RecipeError(f"{self.study.recipe} trains in stages of its own, "
                              f"{len(stages)} for {len(self.study.names)} tasks: expected one a "
                              "task, as o_lora and i_lora have")
        return stages

    @torch.no_grad()
    def logits(self, inputs: Any, task: int | None) -> Tensor:
        """Of the model as it stands, in evaluation."""
        self.tuned.model.eval()
        keys = {} if task is None or "task" not in self.keys else \
            {"task": torch.full((rows_of(inputs),), task)}
        with self.tuned.given(**keys):
            return self.study.stream.logits(call(self.tuned.model, moved(inputs, self.device)))

    def held(self) -> dict[str, Tensor]:
        """Every tensor that is stored, by name."""
        out: dict[str, Tensor] = {}
        for name in self.tuned.adapters:
            out.update(self.tuned.tensors(name))
        named = dict(self.tuned.model.named_parameters())
        owned = {n for a in self.tuned.adapters.values() for n in a.selected}
        out.update({n: named[n].detach() for n in self.head - owned if named[n].requires_grad})
        return out


def rows_of(inputs: Any) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs)


def count(tensors: Any, rows: Sequence[Any] = ()) -> Stored:
    found = list(tensors)
    kept = sum(t.numel() * t.element_size() for r in rows for t in _tensors(r))
    return Stored(sum(t.numel() for t in found),
                  sum(t.numel() * t.element_size() for t in found) + kept, len(rows))


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for v in x.values():
            yield from _tensors(v)
    elif isinstance(x, str):
        yield torch.empty(len(x.encode()), dtype=torch.uint8, device="meta")


# -- by name ----------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every learner there is."""
    folder = Path(__file__).resolve().parent / "learners"
    return tuple(sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")))


def find(name: str) -> type[Learner]:
    """The class behind a name; ConfigError with near misses for an unknown one."""
    if name not in names():
        raise ConfigError(f"no learner {name!r}{nearest(name, names())} "
                          f"(there is {', '.join(names())})")
    module = importlib.import_module(f"burnish.continual.learners.{name}")
    cls = next(c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Learner)
               and c.__module__ == module.__name__)
    cls.name = name
    return cls


def learner(text: str | Learner) -> Learner:
    """``"lae(ema=0.999)"`` or a learner, as a learner. Raises ConfigError."""
    if isinstance(text, Learner):
        if "name" not in vars(type(text)):           # its own, not that of a learner it builds on
            type(text).name = type(text).__module__.rpartition(".")[2]
        return text
    name, args = recipes.read_call(text)
    return recipes.built(find(name), name, args)


def said(one: Learner) -> str:
    """The expression that makes a learner: its name, and what of its settings is not the
    default."""
    changed = [f"{f.name}={getattr(one, f.name)!r}" for f in fields(one)
               if getattr(one, f.name) != f.default]
    return f"{one.name}({', '.join(changed)})" if changed else one.name


__all__ = ["KEYS", "Learner", "Stored", "Study", "find", "learner", "names", "said"]
