"""What to give up first, so that a recipe fits less memory: each step simulated, cheapest first.

What changes nothing but time comes first (a part of the batch at once, activations made again),
then the rounding of frozen weights, then fewer numbers to train, then shorter samples, and last
another way of training. Of what is equally dear, the quickest that fits is taken; where none does,
what saves most for the time it takes, and the question is asked again from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ..core.errors import BurnishError
from ..core.recipe import parse

#: a step that saves less than this share is none
WORTH = 0.01
COSTS = ("nothing but time", "frozen weights are rounded", "fewer numbers train",
         "samples are cut", "another way of training")


@dataclass(frozen=True)
class State:
    """A recipe, samples at once, and tokens in a sample (None where that is no question)."""

    recipe: str
    samples: int
    tokens: int | None = None


@dataclass(frozen=True)
class Step:
    """One concession. saves: bytes, beside the step before. time: of an update, beside it.
    quality: what the prior loses."""

    what: str
    costs: str
    recipe: str
    batch: int
    tokens: int | None
    needs: int
    saves: int
    time: float
    quality: float
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def concessions(start: State, budget: int, look: Callable[[State], tuple[int, float]],
                quality: Callable[[str], float]) -> list[Step]:
    """Steps from `start` until it fits `budget`; the last one's ``fits`` says whether it does.

    look: state -> (bytes needed, seconds of an update); raises BurnishError where that cannot be.
    """
    steps: list[Step] = []
    state, (needs, spent) = start, look(start)
    while needs > budget:
        best = _cheapest(state, needs, spent, budget, look)
        if best is None:
            break
        what, dear, new, less, takes = best
        steps.append(Step(what, COSTS[dear], new.recipe, new.samples, new.tokens, less,
                          needs - less, takes / spent,
                          max(0.0, quality(state.recipe) - quality(new.recipe)), less <= budget))
        state, needs, spent = new, less, takes
    return steps


def _cheapest(state: State, needs: int, spent: float, budget: int, look: Any) -> Any:
    ways = list(_ways(state))
    for dear in range(len(COSTS)):
        found = []
        for what, cost, new in ways:
            if cost != dear:
                continue
            try:
                less, takes = look(new)
            except BurnishError:
                continue
            if needs - less >= WORTH * needs:
                found.append((what, dear, new, less, takes))
        fitting = [f for f in found if f[3] <= budget]
        if fitting:
            return min(fitting, key=lambda f: (f[4], f[3]))
        if found:
            return max(found, key=lambda f: (needs - f[3]) / max(f[4] / spent - 0.95, 0.05))
    return None


def _ways(state: State) -> Iterator[tuple[str, int, State]]:
    parts = parse(state.recipe)
    names = {m.name for m in parts}
    if state.samples > 1:
        half = -(-state.samples // 2)
        yield f"{half} samples at once, gradients accumulated", 0, replace(state, samples=half)
    if not names & {"checkpoint", "mezo", "lst"}:
        plain = [m for m in parts if m.name != "lean"]
        yield "checkpoint", 0, replace(state, recipe=str(parse([*plain, "checkpoint"])))
        if "lean" not in names:
            yield "lean(level=3)", 0, replace(state, recipe=str(parse([*parts, "lean(level=3)"])))
    if "nf4" not in names and "full" not in names:
        yield "nf4", 1, replace(state, recipe=str(parse(["nf4", *parts])))
    if "full" in names:
        rest = [m for m in parts if m.name in ("checkpoint", "lean")]
        yield "lora in place of full", 2, replace(state, recipe=str(parse(["lora", *rest])))
    for k, part in enumerate(parts):
        rank = getattr(part, "rank", None)
        if isinstance(rank, int) and rank > 1:
            less = max(1, rank // 4)
            new = [*parts[:k], replace(part, rank=less), *parts[k + 1:]]
            yield f"rank {less}", 2, replace(state, recipe=str(parse(new)))
    if state.tokens is not None and state.tokens > 16:
        half = math.ceil(state.tokens / 2)
        yield f"{half} tokens a sample", 3, replace(state, tokens=half)
    if "linear_probe" not in names:
        frozen = "nf4 + linear_probe" if "nf4" in names else "linear_probe"
        yield "linear_probe", 4, replace(state, recipe=str(parse(frozen)))
