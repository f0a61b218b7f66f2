from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import RecipeError
from ...engine.stages import divides
from ..learner import Learner, Study


@dataclass
class Joint(Learner):
    """All tasks at once, shuffled together: what there would be to reach if nothing were ever past.

    It is read after the last task alone, so that there is no forgetting to speak of, and no
    average over tasks.
    """

    paper: ClassVar[str] = "common practice"
    whole: ClassVar[bool] = True

    def begin(self, study: Study) -> None:
        super().begin(study)
        if (part := divides(study.recipe)) is None:
            return
        own = list(self.tuned.adapters)
        if any(s.trains not in own or s.only or s.beside
               for s in part.stages(self.tuned, study.names)):
            raise RecipeError(f"{part.name} trains one task after the other, and joint has them "
                              "all at once: leave it out")

    def learn(self, t: int) -> None:
        rows = [r for task in self.study.stream.tasks for r in task.train]
        self.teach(rows, len(self.study.stream.tasks) - 1)
