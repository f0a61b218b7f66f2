"""Simulate a deep model by shallow ones, where its text follows from theirs.

A recipe on a model is simulated with one, two and three rounds of each stack (then two to four,
then three to five: the ends of some recipes are longer); :class:`~.deeper.Rule` is read off the
first, and the last has to be what it says. Where that is so the report of the whole model is read
off the text that the rule gives, and equals that of a whole simulation to the byte.

What cannot be seen in so few blocks is said beforehand: a method whose work on a block depends on
where it stands says so (:meth:`~burnish.core.method.Method.repeats`), and targets that name blocks
by their numbers mean the whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..core.errors import BurnishError, RecipeError
from ..core.recipe import Recipe
from .deeper import Rule
from .depth import Paths, Stack, Unlike, order_of, shallow, stacks_of
from .report import MemoryReport
from .stream import Signs, Stream

#: first rounds tried
STARTS = (1, 2, 3)
#: targets that tell blocks apart: ranges, regular expressions, classes of letters, bare numbers
_NUMBERED = re.compile(r"@|re:|\[|\?|(?:^|\.)-?\d+(?:\.|$)")

#: simulates a model with fewer blocks; of its modules' paths the stream keeps what Paths splits
Run = Callable[..., Stream]


class Shallows:
    """The stacks of a model and its copies with fewer blocks, made once for all recipes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.stacks = stacks_of(model)
        self._made: dict[Any, nn.Module] = {}
        self._begun: dict[str, int] = {}      # part -> the first rounds at which it needs to begin

    def copy(self, stacks: tuple[Stack, ...], rounds: tuple[int, ...]) -> nn.Module:
        key = tuple((s.path, tuple(s.kept(n))) for s, n in zip(stacks, rounds, strict=True))
        if key not in self._made:
            self._made[key] = shallow(self.model, stacks, rounds)
        return self._made[key]

    def starts(self, parts: Recipe) -> list[int]:
        """Rounds of the shortest model, the likeliest first: what its parts needed elsewhere."""
        first = max((self._begun.get(m.name, 1) for m in parts), default=1)
        return [n for n in STARTS if n >= first]

    def began(self, parts: Recipe, start: int) -> None:
        """A recipe was extended from so many rounds, so none of its parts needs more."""
        for m in parts:
            self._begun[m.name] = min(start, self._begun.get(m.name, start))


def extended(shallows: Shallows, parts: Recipe, targets: Any, run: Run, *, always: bool = False
             ) -> MemoryReport | None:
    """The report of the whole model, or None where it has to be simulated whole.

    run: ``run(model, alphabet=..., module=...)`` simulates one. always: also where the whole
        model has no more blocks than the shallow ones have together.
    """
    period = repeats(parts, targets)
    stacks = tuple(_every(s, period) for s in shallows.stacks) if period else ()
    whole = tuple(s.rounds for s in stacks)
    if not stacks:
        return None
    alphabet = Signs()
    seen: dict[tuple[int, ...], Stream] = {}
    refused: list[str] = []

    def at(rounds: tuple[int, ...]) -> Stream:
        if rounds not in seen:
            paths = Paths(stacks, rounds)
            seen[rounds] = run(shallows.copy(stacks, rounds), alphabet=alphabet,
                               module=paths.split,
                               order=partial(order_of, few=paths, whole=Paths(stacks, whole)))
        return seen[rounds]

    for start in shallows.starts(parts):
        base, *longer = _ladder(len(stacks), start)
        proof = (start + 2,) * len(stacks)
        asked = {base, *longer, proof} | set(seen)
        if any(n < m for n, m in zip(whole, proof, strict=True)) or not always and \
                _blocks(stacks, asked) >= _blocks(stacks, [whole]):
            return None
        try:
            rule = Rule.of(at(base), base, [at(r) for r in longer], Paths(stacks, base))
            if rule is not None and rule.proves(at(proof), proof, Paths(stacks, proof)):
                shallows.began(parts, start)
                paths = Paths(stacks, whole)
                return MemoryReport.read(rule.at(whole, paths), paths.join)
        except RecipeError as error:          # parts that do not go together
            refused.append(str(error))
            if len(refused) == 2:             # nor do they with more blocks, in the same words
                if refused[0] == refused[1]:
                    raise
                return None
        except (BurnishError, Unlike):        # the whole model says what is wrong, or works
            return None
    return None


def repeats(parts: Recipe, targets: Any) -> int | None:
    """After how many blocks the recipe begins again; None: it tells blocks apart."""
    asked = [targets, *(m.targets for m in parts)]
    if any(_NUMBERED.search(item) for t in asked for item in _items(t)):
        return None
    periods = [m.repeats() for m in parts]
    known = [p for p in periods if p is not None]
    return math.lcm(*known) if len(known) == len(periods) else None


def _items(targets: Any) -> Iterable[str]:
    items = (targets,) if isinstance(targets, str) else targets or ()
    return (part.strip() for item in items for part in str(item).split(","))


def _every(stack: Stack, period: int) -> Stack:
    """The same stack as a pattern that also comes again every `period` blocks."""
    joined = math.lcm(stack.period, period)
    inner = stack.period * stack.rounds
    rounds = inner // joined
    return replace(stack, period=joined, rounds=rounds,
                   after=stack.after + inner - rounds * joined)


def _ladder(stacks: int, start: int) -> list[tuple[int, ...]]:
    """The rounds of the shortest model, and of those with one round more of one stack."""
    base = (start,) * stacks
    return [base, *(tuple(n + (i == k) for i, n in enumerate(base)) for k in range(stacks))]


def _blocks(stacks: Sequence[Stack], all_rounds: Iterable[tuple[int, ...]]) -> int:
    return sum(len(s.kept(n)) for rounds in all_rounds
               for s, n in zip(stacks, rounds, strict=True))
