from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.taskvector import Rule, Task, TaskVector, combine
from ...core.errors import ConfigError
from ...core.method import Method, setting

#: scales that held-out data choose from
GRID = tuple(k / 20 for k in range(21))


def task_arithmetic(base: Checkpoint, tuned: Sequence[Checkpoint],
                    weights: float | Sequence[float] = 0.4) -> Iterator[tuple[str, Tensor]]:
    """``theta_0 + sum_t lambda_t (theta_t - theta_0)``, tensor by tensor.

    weights: one lambda for all, or one per task; negative ones forget, (l, l, -l) is an analogy.
    """
    w = _per_task(weights, len(tuned))
    tasks = [TaskVector(base, t) for t in tuned]

    def weighted_sum(taus: Tensor, name: str, start: int) -> Tensor:
        return torch.tensor(w, dtype=taus.dtype, device=taus.device) @ taus

    return combine(base, tasks, weighted_sum)


def best_scale(base: Checkpoint, tuned: Sequence[Checkpoint],
               score: Callable[[dict[str, Tensor]], float],
               grid: Sequence[float] = GRID,
               ) -> tuple[float, dict[float, float]]:
    """The shared lambda with the best held-out score (the smallest of equals), and all scores."""
    scores = {x: float(score(dict(task_arithmetic(base, tuned, x)))) for x in grid}
    return max(scores, key=lambda x: (scores[x], -x)), scores


def _per_task(weights: float | Sequence[float], tasks: int) -> list[float]:
    if not tasks:
        raise ConfigError("task_arithmetic needs at least one tuned checkpoint")
    w = [weights] * tasks if isinstance(weights, int | float) else list(weights)
    if len(w) != tasks:
        raise ConfigError(f"task_arithmetic: {tasks} checkpoints and {len(w)} weights")
    return [float(x) for x in w]


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """Task arithmetic: add, subtract and combine weight differences.

    ``tau_t = theta_t - theta_0``, ``theta = theta_0 + lambda sum_t tau_t``; a negative lambda
    forgets, signs per task give an analogy (use :func:`task_arithmetic` with weights). WiSE-FT
    (arXiv:2109.01903) is one task and lambda = 0.5: ``burnish arithmetic base + 0.5*tuned``; an
    adapter of factors is scaled, which is the same.

    Trains nothing: one lambda is chosen on held-out data (:func:`best_scale`, 0 to 1 in steps of
    0.05); 0.4 without. lambda = 0 is the base exactly; one task with lambda = 1 is that model bit
    for bit. Heads whose shapes differ, integers and running statistics stay the base's; tied
    tensors are subtracted once. Cost: a read of every file, one tensor at a time.
    Low-rank updates are summed by stacking (``blocks.weight.factor_algebra.cat``), never factor by
    factor. ``burnish arithmetic`` and ``combine`` are its commands.
    """

    paper = "Editing Models with Task Arithmetic (2023), arXiv:2212.04089"
    tier = "checked against an independent equation"
    grid = GRID

    scale: float = setting(0.4, "lambda, shared by all tasks")

    def rule(self, tasks: Sequence[Task]) -> Rule:
        return lambda taus, *_: self.scale * taus.sum(0)

    def lifecycle(self, base: Checkpoint, *tuned: Checkpoint) -> dict[str, Tensor]:
        """The merged checkpoint."""
        return dict(task_arithmetic(base, tuned, self.scale))
