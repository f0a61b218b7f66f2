from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ...core.stage import Stage
from ...engine.stages import begin
from ...methods.mixture.sema import Sema as Part
from ...methods.mixture.sema import described
from ..learner import Learner, Study


@dataclass
class Sema(Learner):
    """SEMA: a task adds an adapter only where it is unlike what was there, a block at a time.

    The recipe has a part ``sema(...)``. On the first task adapters, routers and head train, then
    the descriptors by themselves. Of each later task the training rows are scanned; the shallowest
    block that signals gets an adapter, which trains (with its router and the head) beside all
    others, then its descriptor; what it is then stays. So on until no block signals, once a block
    and task at most. Where none did, the head trains alone. Cross-entropy among the classes of the
    task. Every phase has a fresh optimizer.

    Stores the adapters that there are: what a task adds is nothing where none came. Answers take
    one pass. The paper: ``sema + sgd(momentum=0.9)``, rate 0.005, decay 5e-4, 20 epochs and 20 of
    descriptors.

    A scan begins anew after each adapter; the authors' goes on through the batches first, and
    begins anew then.
    """

    paper: ClassVar[str] = ("Self-Expansion of Pre-trained Models with Mixture of Adapters for "
                            "Continual Learning (2024), arXiv:2403.18886")
    current: ClassVar[bool] = True

    epochs: int = setting(20, "of descriptors, after as many of adapters as the run says")
    batch: int = setting(128, "rows of a batch in a scan, over which z is averaged")

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ConfigError(f"sema: epochs and batch of at least 1 are expected, got "
                              f"{self.epochs} and {self.batch}")

    def check(self, study: Study) -> None:
        super().check(study)
        if sum(isinstance(m, Part) for m in study.recipe) != 1 or any(
                m.grown is not None for m in study.recipe if isinstance(m, Part)):
            raise RecipeError(f"the learner sema adds adapters of a part sema(...), and "
                              f"{study.recipe} has none to begin with: 'sema'")
        for m in study.recipe:
            if m.context:
                raise RecipeError(f"{m.name} reads {', '.join(m.context)} of the batch, and rows "
                                  "that are scanned say nothing of themselves: leave it out")
            if "controller" in m.axes():
                raise RecipeError(f"{m.name} counts on all that trains, and here it trains in "
                                  "phases: leave it out")

    def begin(self, study: Study) -> None:
        super().begin(study)
        self.part = next(m for m in self.tuned.recipe if isinstance(m, Part))
        self.grown: list[tuple[int, ...]] = []       # blocks that each task has added to
        self._open()

    def joined(self, name: str = "task1", head: bool | str | None = None) -> Any:
        """Adapters that are active together share a head, which none of them owns."""
        return super().joined("task1", False)

    def learn(self, t: int) -> None:
        rows = self.study.stream.tasks[t].train
        grown: list[int] = []
        if t == 0:
            self.phases("task1", t)
        else:
            inputs = [self.given(list(rows[i:i + self.batch]), t).inputs
                      for i in range(0, len(rows), self.batch)]
            while (block := self.part.lifecycle(self.tuned, name := f"task{t + 1}_{len(grown) + 1}",
                                                inputs, but=grown)) is not None:
                grown.append(block)
                self.phases(name, t)
        self.rest()
        if t and not grown and any(p.requires_grad for p in self.tuned.parameters()):
            self.teach(rows, t)                      # the head
        self.grown.append(tuple(grown))

    def phases(self, name: str, t: int) -> None:
        """Train the adapter `name` beside all others: all but its descriptors, then those."""
        rows = self.study.stream.tasks[t].train
        beside = {n: 1.0 for n in self.tuned.adapters if n != name}
        self._open()
        begin(self.tuned, Stage(name, beside=beside, only=lambda n: not described(n)))
        self.teach(rows, t)
        begin(self.tuned, Stage(name, beside=beside, only=described))
        self.teach(rows, t, epochs=self.epochs)

    def rest(self) -> None:
        """All adapters are in use, and none trains."""
        names = dict.fromkeys(self.tuned.adapters, 1.0)
        self.tuned.use(names)
        for n, p in self.tuned.model.named_parameters():
            if ".burnish." in f".{n}":               # a single one that is in use would train
                p.requires_grad_(False)
        self._open()

    def _open(self) -> None:
        if self.study.stream.head in ("auto", True):
            for n in self.head:
                self.tuned.model.get_parameter(n).requires_grad_(True)
