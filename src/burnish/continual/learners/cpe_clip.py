from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.damped import Damped
from ...core.errors import RecipeError
from ...engine.stages import divides
from ..learner import Learner, Study


@dataclass
class CpeClip(Learner):
    """CPE-CLIP: each session moves what trains by the share of classes that it brings.

        p <- p + lambda_s (step of p),   lambda_s = |C_s| / sum_{j <= s} |C_j|

    of all that trains but the head; cross-entropy among the classes of the session alone, answers
    among all that have been seen. No rows of the past, no copy of anything. Of the published method
    the prompts are the recipe ``cpe_clip``, on a model that reads the texts of all classes
    (``Stream(logits=lambda out: out["logits_per_image"])``). Tasks have classes of their own.
    """

    paper: ClassVar[str] = ("Multimodal Parameter-Efficient Few-Shot Class Incremental Learning "
                            "(2023), arXiv:2303.04751")
    current: ClassVar[bool] = True

    def check(self, study: Study) -> None:
        super().check(study)
        if study.stream.scenario == "domain":
            raise RecipeError(f"cpe_clip counts the classes that a task brings, and those of "
                              f"{study.stream.name} bring none: a stream of scenario 'class'")
        if (part := divides(study.recipe)) is not None:
            raise RecipeError(f"{part.name} has its own way through tasks, and so has cpe_clip: "
                              "leave it out")
        if part := next((m for m in study.recipe if m.changed().get("sessions")), None):
            raise RecipeError(f"{part.name}(sessions=...) damps by itself, and so does the "
                              "learner: leave it out")

    def factor(self, t: int) -> float:
        """lambda of task t."""
        counts = [len(task.classes) for task in self.study.stream.tasks[: t + 1]]
        return counts[-1] / sum(counts)

    def learn(self, t: int) -> None:
        damped = Damped([p for n, p in self.tuned.named_parameters() if n not in self.head],
                        self.factor(t))
        damped.hold()
        self.teach(self.study.stream.tasks[t].train, t, after=damped.follow)
