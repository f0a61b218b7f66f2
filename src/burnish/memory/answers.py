"""What a person planning a training asks beside the recipe: how long it takes, on which card, how
far the best plan reaches, and what to give up first. Calls that contradict themselves are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import ConfigError
from .concessions import State, concessions
from .gpus import Gpu, gpu, smaller, smallest
from .limits import Limit, largest, positions
from .search import Search
from .units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from .plan import Plan, Plans


def place(memory: Any, name: str | None, device: str | None) -> tuple[Gpu | None, int, str]:
    """(the card, bytes, device type) of what was said."""
    if name is None:
        return None, parse_bytes("8GB" if memory is None else memory), device or "cpu"
    card = gpu(name)
    if device is not None and torch.device(device).type != card.kind:
        raise ConfigError(f"device={device!r} contradicts gpu={name!r}, which is {card.kind}; "
                          "leave device= out")
    budget = card.shows if memory is None else parse_bytes(memory)
    if budget > card.shows:
        raise ConfigError(f"memory={memory!r} is more than {card.label} shows, "
                          f"{format_bytes(card.shows)} ({card.why}); leave memory= out")
    return card, budget, card.kind


def training_of(batch: Any, samples: int, rows: int | None, tokens: int | None,
              epochs: float | None) -> tuple[int, float, int] | None:
    """(rows, epochs, updates) of the training that was named."""
    for what, value in (("rows", rows), ("tokens", tokens), ("epochs", epochs)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{what}={value} is not positive")
    if rows is not None and tokens is not None:
        raise ConfigError("rows= and tokens= both say how much data there is; give one")
    if tokens is not None:
        length = length_of(batch)
        if length is None:
            raise ConfigError("tokens= needs a batch of (samples, tokens), such as (8, 512)")
        rows = max(1, math.ceil(tokens / length))
    if rows is None:
        if epochs is not None:
            raise ConfigError("epochs= needs rows= or tokens=: how much data is seen so often?")
        return None
    epochs = 1.0 if epochs is None else float(epochs)
    return rows, epochs, max(1, math.ceil(math.ceil(rows / samples) * epochs))


def goal_of(wanted: bool | str, card: Gpu | None, budget: int) -> Gpu | None:
    """The smaller card to give something up for."""
    if wanted is False or wanted is None:
        return None
    if isinstance(wanted, str):
        found = gpu(wanted)
        if found.shows >= budget:
            raise ConfigError(f"{found.label} is not smaller: it shows "
                              f"{format_bytes(found.shows)}, and the budget is "
                              f"{format_bytes(budget)}")
        return found
    found = smaller(budget, card.kind if card else "cuda")
    if found is None:
        raise ConfigError(f"no card that is known shows less than {format_bytes(budget)}")
    return found


def answered(plans: Plans, search: Search, batch: Any, training: tuple[int, float, int] | None,
              limits: bool, goal: Gpu | None, quality: Callable[[str], float]) -> None:
    """Hours, cards, limits and concessions."""
    for p in [*plans.fits, *plans.over]:
        held = smallest(p.needs) if search.device == "cuda" else None
        p.card = held.label if held else None
        if training is not None:
            low, high = (training[2] * s / 3600 for s in p.seconds)
            p.hours = low, high
    if training is not None:
        plans.rows, plans.epochs, plans.updates = training
    best = plans.best
    if limits and best is not None:
        plans.limits = limits_of(search, best, batch)
    if best is None and plans.over:           # the best of its kind, from the whole batch on
        first = max(plans.over, key=lambda p: (not p.recipe.startswith("full"), p.quality))
        start = State(first.recipe, search.samples, length_of(batch))
    elif best is not None and goal is not None:
        plans.goal, plans.held = goal.label, best.needs <= goal.shows
        start = State(best.recipe, best.batch, length_of(batch))
    else:
        return
    asked: dict[int | None, Search] = {length_of(batch): search}

    def look(state: State) -> tuple[int, float]:
        if state.tokens not in asked:
            length = state.tokens
            asked[length] = search.like(lambda n: (n, length))
        at = asked[state.tokens]
        _, found, _ = at.usual.run(state.recipe, lambda r: at.at(str(r), state.samples))
        assert plans.rates is not None
        return found.needs, math.prod(plans.rates.seconds(
            found.report, search.times(state.samples))) ** 0.5

    plans.concessions = concessions(start, goal.shows if goal and best else search.budget, look,
                                    quality)


def limits_of(search: Search, best: Plan, batch: Any) -> dict[str, Limit]:
    """The largest batch and the longest sequence of a plan, every figure simulated."""
    length = length_of(batch)
    at = f" of {length} tokens" if length else ""
    out = {f"largest batch{at}": largest(
        lambda n: search.at(best.recipe, n, best.accumulate).needs, search.budget, best.batch)}
    if length is not None:
        most = positions(search.source)
        longer = search.like(lambda n: (best.batch, n))
        out[f"longest sequence at batch {best.batch}"] = largest(
            lambda n: longer.at(best.recipe, n, best.accumulate).needs, search.budget, length,
            **({} if most is None else {"most": max(most, length),
                                        "why": "the model has no more positions"}))
    return out


def length_of(batch: Any) -> int | None:
    """Tokens of a sample, where the batch says so by number."""
    return batch[1] if isinstance(batch, tuple) and len(batch) == 2 and all(
        isinstance(n, int) for n in batch) else None
