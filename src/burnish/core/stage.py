"""A run in stages: who trains, beside whom, for how long, and what happens then.

    before training    a data pass, an adapter of its own, a warm start
    one task at a time  a new adapter beside the earlier ones, which stay as they are
    head first          some of an adapter's tensors, then all of them

A method that trains in stages says so once (`Method.stages`); whoever drives a run
(engine/stages.py, ``burnish.fit``, the simulator) carries them out, so several adapters may be
active while one trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stretch of a run. Each has an optimizer of its own, and its own warm-up and decay.

    trains: the adapter that trains, by name.
    recipe: joined under that name first, where there is none yet.
    beside: adapter -> weight, active with it and left as they are.
    until: updates, or (a fraction) a share of the run's; None: what the others leave, divided in
        proportion to the data, or as long as the data of the stage last.
    then: called with the tuned model once the stage is over. A run that goes on in a later stage
        calls it again before the saved tensors are put back: it changes what a file holds.
    data: which data, for the driver (the name of a task); None: all there are.
    add: further words for ``tuned.add`` (targets, seed, calibration).
    only: name of a tensor -> does it train? None: all that the adapter trains.
    optimizer: words for ``tuned.optimizer`` (lr, weight_decay), over those of the run.
    schedule: "continue" where the learning rate goes on as the whole run's would.
    """

    trains: str
    recipe: Any = None
    beside: Mapping[str, float] = field(default_factory=dict)
    until: int | float | None = None
    then: Callable[[Any], None] | None = None
    data: Any = None
    add: Mapping[str, Any] = field(default_factory=dict)
    only: Callable[[str], bool] | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Literal["restart", "continue"] = "restart"

    def __post_init__(self) -> None:
        n = self.until
        whole = isinstance(n, int) and not isinstance(n, bool) and n >= 1
        if not (n is None or whole or isinstance(n, float) and 0 < n <= 1):
            raise ConfigError(f"a stage of {self.trains!r} has until={n!r}: expected a number of "
                              "updates, a share of the run above 0 and up to 1.0, or None")
        if self.schedule not in ("restart", "continue"):
            raise ConfigError(f"a stage of {self.trains!r} has schedule={self.schedule!r}: "
                              "expected 'restart' or 'continue'")


def label(stages: Sequence[Stage], number: int) -> str:
    """"2/3 other": what the stage `number` (from 0) is called wherever it is told."""
    return f"{number + 1}/{len(stages)} {stages[number].trains}"


def shares(stages: Sequence[Stage], total: int, sizes: Sequence[int]) -> list[int]:
    """Updates of each stage in a run of `total`: those it names, its share, and for those that
    name neither what is left, in proportion to `sizes` (updates of an epoch of its data).

    Every stage has one update at least, and together they have `total`; raises ConfigError where
    that cannot be.
    """
    out = [s.until if isinstance(s.until, int) else 0 for s in stages]
    told = [i for i, s in enumerate(stages) if isinstance(s.until, float)]
    free = [i for i, s in enumerate(stages) if s.until is None]
    parts = [float(stages[i].until or 0) for i in told]
    if sum(parts) > 1 + 1e-9:
        raise ConfigError(f"the shares of the stages add up to {sum(parts):g} of the run")
    _divide(out, told, parts, total)
    left = total - sum(out)
    if free and left > 0:
        _divide(out, free, [sizes[i] / sum(sizes[j] for j in free) for i in free], left)
    if (need := sum(max(1, n) for n in out)) > total or 0 in out:
        short = next((label(stages, i) for i, n in enumerate(out) if n < 1), "the last")
        raise ConfigError(f"{total} updates are too few for {len(stages)} stages: {short} would "
                          f"have none left; max_steps of {max(need, total + 1)} or more")
    if left and not free:
        raise ConfigError(f"the stages take {sum(out)} updates and the run has {total}: "
                          f"max_steps={sum(out)}, or one stage with until=None")
    return out


def _divide(out: list[int], where: Sequence[int], parts: Sequence[float], total: int) -> None:
    """Whole shares whose running sums are those of `parts`, rounded."""
    done, given = 0.0, 0
    for i, part in zip(where, parts, strict=True):
        done += part
        out[i] = round(done * total) - given
        given += out[i]
