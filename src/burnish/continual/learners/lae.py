from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ...core.stage import Stage
from ...engine.stages import begin, divides
from ..dual import DualWeights, constant
from ..learner import Learner, Stored, Study, count
from ..training import masked


@dataclass
class Lae(Learner):
    """LAE: one module learns, a slow copy of it accumulates, and the surer of the two answers.

        phi_off <- ema phi_off + (1 - ema) phi_on                       after every update
        p = max(softmax f(x; phi_on), softmax f(x; phi_off))            class by class

    phi is all that trains but the head, which both share; phi_off is a copy of phi_on made when the
    second task begins. Cross-entropy among the classes of the current task alone. From the second
    task on the head trains by itself for the first `freeze` epochs, then all of it. The mean runs
    on meanwhile. (The text of the paper averages the two answers; its code takes the larger.)

    Modules learn at like rates by a scale that trains: ``lora(rank=5, train_scale=True,
    targets="k,v")``, ``parallel(placement="attention", bottleneck=5, scale=1.0, act="gelu",
    train_scale=True)``, ``prefix(length=10, mass="own")``; the paper puts them in the first five
    blocks and trains with Adam at a constant rate.
    Stores phi twice.
    Takes any recipe whose tensors keep their sizes; no memory of rows. A recipe with a controller
    counts on all that trains: freeze=0. The head begins the second phase with fresh moments.
    """

    paper: ClassVar[str] = ("A Unified Continual Learning Framework with General Parameter-"
                            "Efficient Tuning (2023), arXiv:2303.10070")
    current: ClassVar[bool] = True

    ema: float = setting(0.9999, "gamma, what the offline module keeps of itself at an update",
                         alias=("gamma",))
    freeze: int = setting(3, "epochs of a task in which the head trains alone, from the second on")

    def __post_init__(self) -> None:
        if not 0 <= self.ema <= 1 or self.freeze < 0:
            raise ConfigError(f"lae: ema from 0 to 1 and freeze of at least 0 are expected, got "
                              f"{self.ema} and {self.freeze}")

    def check(self, study: Study) -> None:
        super().check(study)
        if (part := divides(study.recipe)) is not None:
            raise RecipeError(f"{part.name} has its own way through tasks, and so has lae: leave "
                              "it out")
        if self.freeze >= study.training.epochs:
            raise RecipeError(f"lae: of {study.training.epochs} epochs the head trains alone for "
                              f"{self.freeze}, and nothing would be left: freeze="
                              f"{study.training.epochs - 1} or less")
        if self.freeze and (m := next((m for m in study.recipe if "controller" in m.axes()), None)):
            raise RecipeError(f"{m.name} counts on all that trains, and lae lets the head train "
                              "alone first: lae(freeze=0)")

    def begin(self, study: Study) -> None:
        super().begin(study)
        self.dual: DualWeights | None = None
        self.added = {n: p for n, p in self.tuned.named_parameters() if n not in self.head}
        if not self.added:
            raise RecipeError(f"{study.recipe} trains the head alone, and lae follows what is "
                              "beside it: 'lora(rank=4)'")

    def learn(self, t: int) -> None:
        rows = self.study.stream.tasks[t].train
        if t == 0:
            self.teach(rows, t)
            return
        if self.dual is None:
            self.dual = DualWeights(self.added, constant(self.ema))
        apart = self.freeze and any(p.requires_grad and n in self.head
                                    for n, p in self.tuned.named_parameters())
        if apart:
            begin(self.tuned, Stage("default", only=self.head.__contains__))
            self.teach(rows, t, epochs=self.freeze, after=self.dual.follow)
            begin(self.tuned, Stage("default"))
        self.teach(rows, t, epochs=self.study.training.epochs - (self.freeze if apart else 0),
                   after=self.dual.follow)

    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        """Probabilities among the classes allowed."""
        on = masked(self.logits(inputs, task), allowed).softmax(-1)
        if self.dual is None:
            return on
        with self.dual.standing():
            off = masked(self.logits(inputs, task), allowed).softmax(-1)
        return torch.maximum(on, off)

    def stored(self) -> Stored:
        return count([*self.held().values(), *(self.dual.slow.values() if self.dual else ())])
