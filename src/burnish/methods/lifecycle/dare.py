from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...blocks.update.noise import CounterNoise
from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.taskvector import Changed, Task, TaskVector, combine
from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Dare(Method):
    """DARE: drop entries of a task vector at random and rescale the others, before any merge.

    ``tau' = (1 - m) tau / (1 - p)``, ``m ~ Bernoulli(p)`` per entry, p the drop rate: the mean is
    tau, the variance ``tau^2 p / (1 - p)``. It changes task vectors and joins none: a rule follows,
    as in ``dare + ties`` or ``dare(drop_rate=0.99) + task_arithmetic(scale=1)``.

    Trains nothing. An entry's draw is told by (seed, task, tensor name, its place): no mask is
    kept, and pieces, order and device change nothing. drop_rate=0 is the identity. It suits small
    changes (of fine-tuning; below some 0.005), not those of continued pre-training. ``burnish
    combine`` is its command.
    """

    paper = "Language Models are Super Mario (2023), arXiv:2311.03099"
    tier = "checked against an independent equation"

    drop_rate: float = setting(0.9, "probability of an entry to be dropped", alias=("p",))
    seed: int = setting(0, "of the draws")

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ConfigError("dare: drop_rate is a probability from 0 to below 1, not "
                              f"{self.drop_rate}")

    def change(self, task: Task, number: int) -> Task:
        def dropped(tau: Tensor, name: str, start: int) -> Tensor:
            noise = CounterNoise(self.seed, f"{number} {name}")
            kept = noise.uniform(tau.numel(), start, device=tau.device) >= self.drop_rate
            return tau.where(kept, 0) / (1 - self.drop_rate)

        return Changed(task, dropped)

    def lifecycle(self, base: Checkpoint, tuned: Checkpoint) -> dict[str, Tensor]:
        """The tuned checkpoint with its change so thinned."""
        return dict(combine(base, [self.change(TaskVector(base, tuned), 0)],
                            lambda taus, *_: taus[0]))
