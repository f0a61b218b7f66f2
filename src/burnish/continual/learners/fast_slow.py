from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ...engine.stages import divides
from ..dual import DualWeights, step
from ..learner import Learner, Stored, Study, count
from ..streams import Row
from ..training import Given, batches


@dataclass
class FastSlow(Learner):
    """Fast weights remember, slow weights generalise: each task begins from weights that follow.

        loss + weight sum_i Omega_i (fast_i - star_i)^2                  while a task is learnt
        slow <- slow + rate (fast - slow)                                after it

    Omega is the running mean over past tasks of squared gradients of the loss, batch by batch (a
    diagonal Fisher); star the fast weights that the task before ended with. A task begins from the
    slow weights, which also answer (answers="slow"), or the fast ones do. rate=1 is elastic weight
    consolidation, with weight=0 plain fine-tuning (``sequential``); weight=0 is Reptile over tasks.

    Takes any recipe whose tensors keep their sizes; stores what trains three times besides itself.
    All is a reading of the text (unconfirmed): the second step of consolidation, which folds fast
    weights into slow ones, is the plain step above.
    """

    paper: ClassVar[str] = ("Few-shot Continual Learning: a Brain-inspired Approach (2021), "
                            "arXiv:2104.09034; Overcoming catastrophic forgetting in neural "
                            "networks (2017), arXiv:1612.00796")

    weight: float = setting(100.0, "lambda, of the pull to the last task's weights")
    rate: float = setting(0.5, "eta, how far slow weights go to fast ones after a task")
    answers: Literal["slow", "fast"] = setting("slow", "which weights answer: slow or fast")

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 < self.rate <= 1 or self.answers not in ("slow", "fast"):
            raise ConfigError("fast_slow: a weight of at least 0, a rate above 0 and up to 1 and "
                              "answers of 'slow' or 'fast' are expected, got "
                              f"{self.weight}, {self.rate} and {self.answers!r}")

    def check(self, study: Study) -> None:
        super().check(study)
        if (part := divides(study.recipe)) is not None:
            raise RecipeError(f"{part.name} divides a run over its tasks, and fast_slow has one "
                              "adapter for all: leave it out")

    def begin(self, study: Study) -> None:
        super().begin(study)
        self.fast: dict[str, nn.Parameter] = dict(self.tuned.named_parameters())
        self.dual = DualWeights(self.fast, step(self.rate))
        self.star: dict[str, Tensor] = {}
        self.omega: dict[str, Tensor] = {}
        self.known = 0

    def learn(self, t: int) -> None:
        rows = self.study.stream.tasks[t].train
        if self.known:
            self.dual.adopt()
        self.teach(rows, t)
        self.star = {n: p.detach().clone() for n, p in self.fast.items()}
        self.known += 1
        if self.weight:
            self._weigh(rows, t)
        self.dual.follow()

    def penalty(self) -> Tensor:
        """sum_i Omega_i (fast_i - star_i)^2."""
        return torch.stack([(self.omega[n] * (p - self.star[n]).square()).sum()
                            for n, p in self.fast.items()]).sum()

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        out = super().loss(z, given, t)
        return out + self.weight * self.penalty() if self.omega and not self.weighing else out

    weighing = False                                 # the task's own gradients are wanted

    def _weigh(self, rows: Any, t: int) -> None:
        """Omega of this task, and the running mean with those before it."""
        new = {n: torch.zeros_like(p) for n, p in self.fast.items()}
        some: list[list[Row]] = list(batches(rows, self.study.training.batch, self.study.seed))
        self.tuned.model.eval()
        self.weighing = True
        try:
            for part in some:
                given = self.given(part, t)
                keys = {k: v for k, v in given.keys.items() if k in self.keys}
                with self.tuned.given(**keys):
                    found = self.tuned.probe((given.inputs, given.labels), self._plain(given, t))
                for n, g in found.grads.items():
                    new[n] += g.detach().square() / len(some)
        finally:
            self.weighing = False
        self.omega = {n: new[n] if n not in self.omega else
                      self.omega[n] + (new[n] - self.omega[n]) / self.known for n in new}

    def _plain(self, given: Given, t: int) -> Callable[[Any, Any], Tensor]:
        return lambda out, _: self.loss(self.study.stream.logits(out), given, t)

    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        if self.answers == "fast":
            return self.logits(inputs, task)
        with self.dual.standing():
            return self.logits(inputs, task)

    def stored(self) -> Stored:
        return count([*self.held().values(), *self.dual.slow.values(), *self.star.values(),
                      *self.omega.values()])
