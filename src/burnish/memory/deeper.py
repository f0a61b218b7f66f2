"""The stream of a deep model, written from those of shallow ones, where that is exact.

Two texts that differ by one round of a stack differ by insertions: `loops_of` finds them. What a
text of any depth looks like follows: at each place the insertion comes once more per round, with
the numbers of its blocks counted on (a forward counts up, a backward down). That is a rule about
the whole run, not about its peak: which moment is the highest is read off the text that it gives,
so a peak that moves from the loss into a block as the model grows deeper is found where it is.

Nothing is taken on trust. A third text, deeper in every stack, has to be what the rule says, sign
by sign; so have counts and costs. Where it is not (blocks drawn at random, a budget that is shared
among all, a segment every so many blocks), there is no rule, and the whole model is simulated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .depth import Paths
from .stream import Stream

#: two sums of the same seconds in another order differ by no more
_ROUNDING = 1e-9
#: how far ahead an insertion is compared before it is believed, and how often one is looked for
_AHEAD, _INSERTIONS = 4096, 4096
#: a number that a note tells; one inside a module's path is part of its name
_NUMBER = re.compile(r"(?<![\w.])\d+(?!\w|\.\d)")


@dataclass(frozen=True)
class Loop:
    """`signs` come before position `at` of the shorter text, once per round more.

    rounds: of each sign in the longer text; steps: how they change from one copy to the next.
    """

    at: int
    signs: np.ndarray
    rounds: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class Rule:
    """base: the stream with `rounds` of each stack. loops: per stack. slopes: how the round of each
    sign of the base changes with one round more of its own stack. counts, costs, notes: per stack,
    what one round more adds (to the numbers that notes tell)."""

    base: Stream
    rounds: tuple[int, ...]
    loops: tuple[tuple[Loop, ...], ...]
    slopes: np.ndarray
    counts: tuple[dict[str, int], ...]
    costs: tuple[dict[str, dict[str, float]], ...]
    notes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, base: Stream, rounds: tuple[int, ...], longer: Sequence[Stream], paths: Paths
           ) -> Rule | None:
        """From a text, and for each stack the text with one round more; None where those are not
        the first one with insertions."""
        owner = np.array([paths.stack_of(s.module) for s in base.alphabet.known])[base.signs] \
            if len(base.signs) else np.zeros(0, dtype=np.int64)
        slopes = np.zeros(len(base.signs), dtype=np.int64)
        loops = []
        for n, other in enumerate(longer):
            found = _insertions(base.signs, other.signs)
            if found is None or not _same_facts(base, other):
                return None
            kept, spans = found
            change = other.rounds[kept] - base.rounds
            mine = owner == n
            if np.any(change[~mine]) or not np.all((change >= 0) & (change <= 1)):
                return None
            slopes[mine] = change[mine]
            loops.append(tuple(_loop(other, at, start, length) for at, start, length in spans))
        counts = tuple({k: v - base.counts[k] for k, v in o.counts.items()} for o in longer)
        costs = tuple({f: {p: v - base.costs[f][p] for p, v in phases.items()}
                       for f, phases in o.costs.items()} for o in longer)
        told = _numbers(base.facts)
        notes = tuple(tuple(b - a for a, b in zip(told, _numbers(o.facts), strict=True))
                      for o in longer)
        return cls(base, rounds, tuple(loops), slopes, counts, costs, notes)

    def at(self, rounds: Sequence[int], paths: Paths) -> Stream:
        """The stream of the same model with so many rounds of each stack."""
        base = self.base
        more = [n - m for n, m in zip(rounds, self.rounds, strict=True)]
        owners = np.array([paths.stack_of(s.module) for s in base.alphabet.known], dtype=np.int64)
        mine = owners[base.signs]
        growth = np.array([*more, 0], dtype=np.int64)[mine]
        here = base.rounds + self.slopes * growth
        parts: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        for n, (loops, times) in enumerate(zip(self.loops, more, strict=True)):
            parts += [(loop.at, n, *_copies(loop, times)) for loop in loops]
        signs: list[np.ndarray] = []
        turns: list[np.ndarray] = []
        last = 0
        for at, _, s, r in sorted(parts, key=lambda p: p[:2]):
            signs += [base.signs[last:at], s]
            turns += [here[last:at], r]
            last = at
        signs.append(base.signs[last:])
        turns.append(here[last:])
        counts = {k: v + sum(m * c[k] for m, c in zip(more, self.counts, strict=True))
                  for k, v in base.counts.items()}
        costs = {f: {p: v + sum(m * c[f][p] for m, c in zip(more, self.costs, strict=True))
                     for p, v in phases.items()} for f, phases in base.costs.items()}
        told = [v + sum(m * s for m, s in zip(more, slopes, strict=True)) for v, *slopes in
                zip(_numbers(base.facts), *self.notes, strict=True)]
        return Stream(base.alphabet, np.concatenate(signs), np.concatenate(turns), costs, counts,
                      _telling(base.facts, told))

    def proves(self, stream: Stream, rounds: Sequence[int], paths: Paths) -> bool:
        """Is `stream`, simulated with `rounds`, what the rule says, in every sign and sum?"""
        said = self.at(rounds, paths)
        return (np.array_equal(said.signs, stream.signs)
                and np.array_equal(said.rounds, stream.rounds)
                and said.counts == stream.counts and said.facts == stream.facts
                and said.costs.keys() == stream.costs.keys()
                and all(math.isclose(v, stream.costs[f][p], rel_tol=_ROUNDING, abs_tol=1e-30)
                        for f, phases in said.costs.items() for p, v in phases.items()))


def _same_facts(a: Stream, b: Stream) -> bool:
    """Do both say the same, but for the numbers in their notes?"""
    return a.costs.keys() == b.costs.keys() and \
        _telling(a.facts, [0] * len(_numbers(a.facts))) == \
        _telling(b.facts, [0] * len(_numbers(b.facts)))


def _numbers(facts: dict[str, Any]) -> list[int]:
    return [int(n) for note in facts.get("notes", ()) for n in _NUMBER.findall(note)]


def _telling(facts: dict[str, Any], numbers: Iterable[int]) -> dict[str, Any]:
    """The same facts with other numbers in their notes."""
    it = iter(numbers)
    notes = [_NUMBER.sub(lambda m: str(next(it)), note) for note in facts.get("notes", ())]
    return {**facts, "notes": notes} if "notes" in facts else facts


def _loop(longer: Stream, at: int, start: int, length: int) -> Loop:
    """A loop counts up or down as a whole: as what stands `length` signs before or behind it, where
    that is the same sign, is numbered."""
    here = slice(start, start + length)
    signs, rounds = longer.signs[here], longer.rounds[here]
    up = 0
    for other, sense in ((start - length, 1), (start + length, -1)):
        span = np.arange(other, other + length)
        inside = (span >= 0) & (span < len(longer.signs))
        span, s, r = span[inside], signs[inside], rounds[inside]
        alike = (longer.signs[span] == s) & (r >= 0)
        up += sense * int(np.sign(r[alike] - longer.rounds[span][alike]).sum())
    return Loop(at, signs, rounds, np.where(rounds >= 0, 1 if up >= 0 else -1, 0))


def _copies(loop: Loop, times: int) -> tuple[np.ndarray, np.ndarray]:
    """`times` copies; those that count down begin as high as there are rounds."""
    turn = np.repeat(np.arange(times), len(loop.signs))
    steps = np.tile(loop.steps, times)
    rounds = np.tile(loop.rounds, times) + steps * turn + np.where(steps < 0, times - 1, 0)
    return np.tile(loop.signs, times), rounds


def _insertions(short: np.ndarray, long: np.ndarray
                ) -> tuple[np.ndarray, list[tuple[int, int, int]]] | None:
    """(where each sign of `short` stands in `long`, [(position in short, start in long, length)]),
    or None where `long` is not `short` with insertions."""
    kept = np.empty(len(short), dtype=np.int64)
    spans: list[tuple[int, int, int]] = []
    i = j = 0
    while True:
        same = _common(short[i:], long[j:])
        kept[i:i + same] = np.arange(j, j + same)
        i, j = i + same, j + same
        left = (len(long) - j) - (len(short) - i)
        if i == len(short):
            if left:
                spans.append((i, j, left))
            return kept, spans
        if left <= 0 or len(spans) >= _INSERTIONS:
            return None
        starts = j + 1 + np.flatnonzero(long[j + 1:j + left + 1] == short[i])
        if not len(starts):
            return None
        reach = [_common(short[i:i + _AHEAD], long[s:s + _AHEAD]) for s in starts.tolist()]
        best = int(starts[int(np.argmax(reach))])
        spans.append((i, j, best - j))
        j = best


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    step, done = 256, 0
    while done < n:
        end = min(done + step, n)
        differ = np.flatnonzero(a[done:end] != b[done:end])
        if len(differ):
            return done + int(differ[0])
        done, step = end, step * 4
    return n
