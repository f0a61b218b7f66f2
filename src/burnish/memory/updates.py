"""An update of several batches, whose gradients add up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..core.errors import ConfigError

#: batches after which no other takes more: of three there is a first, one between and a last
ALIKE = 3


def check_accumulation(accumulation: int) -> None:
    if accumulation < 1:
        raise ConfigError(f"accumulation={accumulation}: expected 1 or more batches of an update")


def each_of(accumulation: int) -> dict[str, int]:
    """Words for ``tuned.optimizer``."""
    return {"accumulation": accumulation} if accumulation > 1 else {}


def passes_of(tuned: Any, accumulation: int) -> int:
    """How many batches show what `accumulation` of them take: the third finds what the second
    found, but where a step inside backward acts in the last of them all."""
    plan = getattr(tuned.current_optimizer, "plan", None)
    return accumulation if getattr(plan, "in_backward", False) else min(accumulation, 2)


def update(tuned: Any, batch: Any, loss: Any, passes: int, last: Callable[[], None]) -> None:
    """One update of so many passes over a batch. last: called before the last of them."""
    words = () if loss is None else (loss,)
    if passes == 1:
        last()
        tuned.step(batch, *words)
        return
    tuned.current_optimizer.zero_grad(set_to_none=True)
    for k in range(passes):
        alone = getattr(tuned.steps.through, "no_sync", None) if k < passes - 1 else None
        if k == passes - 1:
            last()
        with alone() if alone is not None else contextlib.nullcontext():
            tuned.backward(batch, *words, scale=1 / passes)
    tuned.current_optimizer.step()
