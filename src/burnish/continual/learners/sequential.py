from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.method import setting
from ...engine.stages import begin, divides
from ..learner import Learner, Study
from ..streams import Row

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


@dataclass
class Sequential(Learner):
    """A task after the other with nothing against forgetting: the floor that others stand on.

    Cross-entropy among the classes seen so far (compete="seen"), or of the task alone ("current":
    columns of earlier classes are left as they are). A recipe that divides a run over tasks is
    carried out as it says: ``lora(rank=4) + o_lora`` has an adapter for each task, and the head,
    which is shared, trains beside them in all.
    """

    paper: ClassVar[str] = "common practice"

    compete: Literal["seen", "current"] = setting(
        "seen", "classes that compete in training: seen so far, or of this task alone")

    @property
    def current(self) -> bool:                       # type: ignore[override]
        return self.compete == "current"

    def begin(self, study: Study) -> None:
        self.staged, self.plan = divides(study.recipe) is not None, []
        super().begin(study)
        if self.staged:
            self.plan = self.stages()
            self._open()

    def joined(self, name: str = "default", head: bool | str | None = None) -> Tuned:
        """Adapters that are active together share a head, which none of them owns."""
        return super().joined("task1", False) if self.staged else super().joined(name, head)

    def rows(self, t: int) -> Sequence[Row]:
        """Those of task t that are trained on."""
        return self.study.stream.tasks[t].train

    def learn(self, t: int) -> None:
        rows = self.rows(t)
        if self.staged:
            begin(self.tuned, self.plan[t], calibration=self.reads(rows))
            self._open()
        self.teach(rows, t)
        if self.staged and (then := self.plan[t].then) is not None:
            then(self.tuned)

    def _open(self) -> None:
        if self.study.stream.head in ("auto", True):
            for n in self.head:
                self.tuned.model.get_parameter(n).requires_grad_(True)
