from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ..bank import Features, check_alone, linear_head, nearest_to_centres
from ..learner import Learner, Stored, Study, count
from ..streams import Row
from ..training import Given, cross_entropy, masked


@dataclass
class Conpet(Learner):
    """ConPET in its dynamic form: an adapter a task with classes of its own, and one that chooses.

        p(t | x)  of the selector, over the tasks seen
        logits(x) = those of the `top` likeliest tasks, each on its own classes; all others lose

    Task t gets an adapter and a head, trained by cross-entropy among its classes; the selector, an
    adapter of the same recipe with a head over tasks, by `weight` times the cross-entropy over
    tasks, on rows of this task and kept ones of the past, each task counting alike. The two share
    no tensor, so they are trained one after the other. No run sees more than `cap` rows a task, new
    and old together, so that a task costs the same however many came before. Kept are `memory` rows
    a task, the nearest to the centres of a k-means over the features that enter the head.

    Answers cost 1 + top passes. Stores an adapter and a head a task, one selector, and the rows
    kept. Rows that say their task are answered by that task's adapter. Departures: a filler of
    -inf in place of -100, which a real logit could pass; all rows train (the authors keep a fifth
    to validate), prototypes are left out (unconfirmed). Its static form is ``replay(cap=...)``.
    """

    paper: ClassVar[str] = ("ConPET: Continual Parameter-Efficient Tuning for Large Language "
                            "Models (2023), arXiv:2309.14763")
    current: ClassVar[bool] = True

    top: int = setting(1, "n, tasks that run for a row")
    weight: float = setting(0.1, "of the selector's loss")
    memory: int = setting(20, "rows of the past that are kept")
    cap: int = setting(2500, "rows of a task that are trained on; None: all")

    def __post_init__(self) -> None:
        if self.top < 1 or self.memory < 1 or self.cap < 2 or not self.weight > 0:
            raise ConfigError(f"conpet: top and memory of at least 1, cap of at least 2 and a "
                              f"weight above 0 are expected, got {self.top}, {self.memory}, "
                              f"{self.cap} and {self.weight}")

    def check(self, study: Study) -> None:
        super().check(study)
        check_alone(study, "conpet")
        if study.stream.scenario == "domain":
            raise RecipeError("conpet: tasks have classes of their own, and those of "
                              f"{study.stream.name} have the same")
        if study.stream.head not in ("auto", True):
            raise RecipeError("conpet trains a head for each task, and this stream's model keeps "
                              "its own (head=False)")

    def begin(self, study: Study) -> None:
        super().begin(study)
        path = linear_head(self.tuned, "conpet")
        self.features = Features(self.tuned.model.get_submodule(path))
        self.words = {"targets": study.stream.targets, "head": study.stream.head}
        self.tuned.add("selector", study.recipe, seed=study.seed + 1, **self.words)
        if any(not (set(self.head) & set(a.selected)) for a in self.tuned.adapters.values()):
            raise RecipeError(f"conpet: {study.recipe} does not train the head")
        self.past: list[tuple[Row, int]] = []        # rows that are kept, and their tasks
        self.used: list[tuple[int, int]] = []        # rows of each task, and of its selector
        self.choosing, self.known = False, 0

    def joined(self, name: str = "task1", head: bool | str | None = None) -> Any:
        return super().joined("task1", head)

    def learn(self, t: int) -> None:
        study, rows = self.study, self.study.stream.tasks[t].train
        draw = torch.Generator().manual_seed(7919 * study.seed + t)
        name = f"task{t + 1}"
        if name not in self.tuned.adapters:
            self.tuned.add(name, study.recipe, seed=study.seed + 1 + t, **self.words,
                           calibration=self.reads(rows))
        self.tuned.use(name)
        mine = _some(rows, self.cap, draw)
        self.teach(mine, t)
        kept = nearest_to_centres(self._features(mine), self.memory, draw)

        old = _some(self.past, self.cap // 2, draw)
        new = _some(mine, self.cap - len(old), draw)
        self.used.append((len(mine), len(new) + len(old)))
        self.tuned.use("selector")
        both = [*[(r, t) for r in new], *old]
        self.many = torch.bincount(torch.tensor([k for _, k in both]), minlength=t + 1)
        self.choosing = True
        try:
            self.teach(both, t, step=self._labelled)     # type: ignore[arg-type]
        finally:
            self.choosing = False
        self.past += [(mine[i], t) for i in kept]
        self.known = t + 1

    def _labelled(self, rows: list[Any], t: int) -> Given:
        given = self.given([r for r, _ in rows], t)
        return Given(given.inputs, torch.tensor([k for _, k in rows]), given.keys)

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        if not self.choosing:
            return cross_entropy(z, given.labels, self.allowed(given, t))
        each = F.cross_entropy(masked(z, _first(t + 1, z.shape[1])), given.labels.to(z.device),
                               reduction="none")
        # every task counts alike over an epoch
        share = (self.many.sum() / (len(self.many) * self.many))[given.labels.cpu()].to(each)
        return self.weight * (each * share).mean()

    @torch.no_grad()
    def choose(self, inputs: Any) -> Tensor:
        """(rows, tasks seen): p(t | x)."""
        self.tuned.use("selector")
        z = self.logits(inputs, None)
        return masked(z, _first(self.known, z.shape[1])).softmax(-1)[:, :self.known]

    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        if task is not None:
            self.tuned.use(f"task{min(task, max(self.known, 1) - 1) + 1}")
            return self.logits(inputs, task)
        p = self.choose(inputs)
        return self.under(inputs, p.topk(min(self.top, self.known), -1).indices)

    def under(self, inputs: Any, chosen: Tensor) -> Tensor:
        """Logits of the tasks chosen for each row (rows, n), each on its own classes."""
        stream = self.study.stream
        out = torch.full((len(chosen), stream.width), -torch.inf)
        for k in chosen.unique().tolist():
            self.tuned.use(f"task{k + 1}")
            rows = (chosen == k).any(-1)
            z = self.logits(inputs, None).float().cpu()
            own = list(stream.tasks[k].classes)
            out[rows.nonzero(), own] = z[rows][:, own]
        return out

    def _features(self, rows: list[Row]) -> Tensor:
        n = self.study.training.batch
        return torch.cat([self.features.of(self.tuned, self.study.stream.collate(
            [x for x, _ in rows[i:i + n]])).cpu() for i in range(0, len(rows), n)])

    def stored(self) -> Stored:
        return count(self.held().values(), [x for (x, _), _ in self.past])


def _some(rows: Any, n: int, draw: torch.Generator) -> list[Any]:
    """n of the rows at most, drawn."""
    return list(rows) if len(rows) <= n else \
        [rows[i] for i in torch.randperm(len(rows), generator=draw)[:n].tolist()]


def _first(n: int, width: int) -> Tensor:
    return torch.arange(width) < n
