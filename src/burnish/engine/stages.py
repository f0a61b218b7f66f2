"""Carrying out the stages of a run, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..core.stage import Stage

if TYPE_CHECKING:
    from .tuned import Tuned


def run(tuned: Tuned, stages: Iterable[Stage], data: Callable[[Stage], Iterable[Any]],
        loss: Callable[[Any, Any], Tensor] | None = None, **optimizer: Any
        ) -> Iterator[tuple[Stage, int, Tensor]]:
    """See :meth:`burnish.Tuned.run`."""
    for stage in stages:
        if stage.trains not in tuned.adapters:
            if stage.recipe is None:
                raise ConfigError(f"a stage trains {stage.trains!r}, which is no adapter yet, and "
                                  "brings no recipe for it")
            tuned.add(stage.trains, stage.recipe, **stage.add)
        tuned.use({**stage.beside, stage.trains: 1.0}, train=stage.trains)
        tuned.total_steps = stage.until
        tuned.optimizer(**optimizer)
        done = 0
        for batch in data(stage):
            if stage.until is not None and done >= stage.until:
                break
            yield stage, done, tuned.step(batch, loss)
            done += 1
        if not done or stage.until is not None and done < stage.until:
            raise DataError(f"the data of stage {stage.trains!r} ended after {done} updates"
                            + (f" of {stage.until}" if stage.until is not None else ""))
        if stage.then is not None:
            stage.then(tuned)
