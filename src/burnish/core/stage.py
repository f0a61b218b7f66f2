"""A run in stages: who trains, beside whom, for how long, and what happens then.

    before training    a data pass, an adapter of its own, a warm start
    one task at a time  a new adapter beside the earlier ones, which stay as they are

A method that trains in stages says so once (`Method.stages`); whoever drives a run
(engine/stages.py) carries them out, so several adapters may be active while one trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stretch of a run.

    trains: the adapter that trains, by name.
    recipe: joined under that name first, where there is none yet.
    beside: adapter -> weight, active with it and left as they are.
    until: updates; None: as long as the data of the stage last.
    data: which data, for the driver (the name of a task); None: all there are.
    then: called with the tuned model once the stage is over.
    add: further words for ``tuned.add`` (targets, seed, calibration).
    """

    trains: str
    recipe: Any = None
    beside: Mapping[str, float] = field(default_factory=dict)
    until: int | None = None
    data: Any = None
    then: Callable[[Any], None] | None = None
    add: Mapping[str, Any] = field(default_factory=dict)
