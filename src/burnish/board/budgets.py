"""What is equal among the recipes of a board.

    as_is       nothing: each with its own defaults, for the task's epochs
    parameters  as many trained numbers as ``lora(rank=8)``: the size setting of a recipe (rank,
                bottleneck, length, ...) is the largest that trains no more
    peak        the bytes of a step of ``lora(rank=8)``: batches are halved, their gradients
                added up, until a step takes no more
    time        the processor seconds of ``lora(rank=8)``: as many updates as fit in them
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..core.errors import BurnishError, ConfigError, RecipeError
from ..core.recipe import parse
from .tasks import Task

BUDGETS = ("as_is", "parameters", "peak", "time")
YARDSTICK = "lora(rank=8)"
#: settings that say how much a method trains, the telling one first
SIZES = ("rank", "init_rank", "bottleneck", "length", "n", "density", "entries", "dimension",
         "hidden", "code", "features")
#: sizes are tried up to this power of two
LARGEST = 12


@dataclass(frozen=True)
class Share:
    """What a recipe does within a budget. batch: samples at once."""

    recipe: str
    batch: int
    updates: int
    limit: float | None = None


def share(task: Task, recipe: str, budget: str) -> Share:
    """Raises RecipeError where the recipe has no size that keeps the budget, ConfigError for a
    budget that is none, and what :func:`burnish.simulate` raises where the model refuses it."""
    recipe = str(parse(recipe))
    if budget == "as_is":
        return Share(recipe, task.batch, task.updates)
    if budget == "parameters":
        most = trained(task, YARDSTICK)
        return Share(sized(task, recipe, most), task.batch, task.updates, most)
    if budget == "peak":
        most = peak(task, YARDSTICK, task.batch)
        batch = task.batch
        while (takes := peak(task, recipe, batch)) > most:
            if batch == 1:
                raise RecipeError(f"{recipe}: a step on one sample takes {takes} bytes, and "
                                  f"{YARDSTICK} takes {most} on {task.batch}")
            batch = -(-batch // 2)
        return Share(recipe, batch, task.updates, most)
    if budget == "time":
        own, theirs = seconds(task, recipe)
        return Share(recipe, task.batch, max(1, round(task.updates * theirs / own)),
                     theirs * task.updates)
    raise ConfigError(f"budget={budget!r}: expected one of {', '.join(BUDGETS)}")


def peak(task: Task, recipe: str, samples: int) -> int:
    """Bytes of a step, simulated."""
    return report(task, recipe, samples).peak_bytes


def trained(task: Task, recipe: str) -> int:
    return report(task, recipe, task.batch).trainable


def report(task: Task, recipe: str, samples: int) -> Any:
    from ..memory import simulate

    return simulate(task.fresh().train(), recipe, task.first(samples), loss=task.loss, **task.how)


def sized(task: Task, recipe: str, most: int) -> str:
    """The recipe with the largest size that trains `most` numbers or fewer."""
    parts = parse(recipe)
    found = next(((k, f.name) for size in SIZES for k, p in enumerate(parts) for f in fields(p)
                  if f.name == size and isinstance(getattr(p, size), int | float)
                  and not isinstance(getattr(p, size), bool)), None)
    if found is None:
        count = trained(task, recipe)
        if count > most:
            raise RecipeError(f"{recipe} trains {count} numbers, has no setting to train fewer, "
                              f"and {YARDSTICK} trains {most}")
        return recipe
    at, name = found

    def made(value: float) -> str:
        return " + ".join(str(replace(p, **{name: value})) if k == at else str(p)
                          for k, p in enumerate(parts))

    whole = isinstance(getattr(parts[at], name), int)
    # doubled (a size may have to divide a width), then one by one in between; shares by 5 per cent
    steps: list[float] = [2 ** k for k in range(LARGEST + 1)] if whole else \
        [float(f"{10 ** (-4 + k / 50):.3g}") for k in range(201)]
    refused: list[BurnishError] = []

    def fits(value: float) -> bool:
        try:
            return trained(task, made(value)) <= most
        except BurnishError as e:
            refused.append(e)
            return False

    best = max((v for v in steps if fits(v)), default=None) if whole else _largest(steps, fits)
    if whole and best is not None:
        best = _largest([*range(int(best), 2 * int(best))], fits)
    if best is None:
        raise refused[0] if refused else RecipeError(
            f"{recipe}: no {name} of it trains {most} numbers or fewer, as many as {YARDSTICK}")
    return made(best)


def _largest(values: Sequence[float], fits: Callable[[float], bool]) -> float | None:
    """The last value that fits, where those that fit come first."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def seconds(task: Task, recipe: str, turns: int = 6) -> tuple[float, float]:
    """Processor seconds of an update of the recipe, and of the yardstick: the least of turns that
    alternate."""
    import torch

    import burnish

    batch, took = task.epoch("train", 0)[0], {}
    runs: dict[str, Any] = {}
    for key, what in (("own", recipe), ("theirs", YARDSTICK)):
        torch.manual_seed(0)
        tuned = burnish.tune(task.fresh().train(), what, calibration=task.epoch("train", 0)[:4],
                             seed=0, **task.how)
        tuned.total_steps = task.updates
        tuned.optimizer(lr=task.rate)
        runs[key], took[key] = tuned, []
    for turn in range(turns + 1):
        for key, tuned in runs.items():
            began = time.process_time()
            tuned.step(batch, loss=task.loss)
            if turn:
                took[key].append(time.process_time() - began)
    return min(took["own"]), min(took["theirs"])
