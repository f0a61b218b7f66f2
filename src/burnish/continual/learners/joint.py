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

    def check(self, study: Study) -> None:
        super().check(study)
        if (part := divides(study.recipe)) is not None and part.name == "o_lora":
            raise RecipeError(f"{part.name} trains one task after the other, and joint has them "
                              "all at once: leave it out")

    def learn(self, t: int) -> None:
        rows = [r for task in self.study.stream.tasks for r in task.train]
        self.teach(rows, len(self.study.stream.tasks) - 1)
