from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.taskvector import Rule, Task, merged
from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    """TIES: trim task vectors, elect a sign, average those that agree.

    ``tau_t = theta_t - theta_0``. Trim: of each task the ``ceil(density n)`` largest ``|tau_t|`` of
    all its n entries stay (more only where magnitudes tie), the others are 0. Elect:
    ``gamma = sign(sum_t tau_t)`` per entry. Merge: ``tau`` = the mean of the trimmed entries that
    are not 0 and have this sign, 0 where there is none (and where the sum is 0).
    ``theta = theta_0 + scale tau``.

    Trains nothing. One threshold over the whole vector, exact, by histograms: no flat copy; a read
    of every file per pass, one tensor at a time. The factors A and B of adapters are not trimmed by
    themselves, as some libraries do: it is their product that is a change. ``burnish combine``
    is its command; ``--data`` chooses the scale (0.8 to 3 in steps of 0.2).
    """

    paper = "TIES-Merging: Resolving Interference When Merging Models (2023), arXiv:2306.01708"
    tier = "checked against an independent equation"
    grid = tuple(round(0.8 + 0.2 * k, 1) for k in range(12))

    density: float = setting(0.2, "share of each task's entries that stays", alias=("k",))
    scale: float = setting(1.0, "lambda, what the merged change counts", alias=("lambda",))

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError("ties: density is a share, above 0 and at most 1, not "
                              f"{self.density}")

    def rule(self, tasks: Sequence[Task]) -> Rule:
        least = torch.tensor([t.threshold(self.density) for t in tasks]).unsqueeze(1)

        def agreed(taus: Tensor, name: str, start: int) -> Tensor:
            kept = taus.where(taus.float().abs() >= least.to(taus.device), 0)
            agree = kept.sign() == kept.sum(0).sign()      # where all is 0, or they cancel: 0
            return self.scale * kept.where(agree, 0).sum(0) / agree.sum(0).clamp(min=1)

        return agreed

    def lifecycle(self, base: Checkpoint, *tuned: Checkpoint) -> dict[str, Tensor]:
        """The merged checkpoint."""
        return dict(merged(base, tuned, [self]))
