"""A ledger written down as one stream of small signs: births, deaths, and the events between them.

The stream says everything that a report says, and it is a text that can be compared. Where a model
is a run of equal blocks, the texts of two depths differ in insertions alone: here a block's
forward, there its backward, its gradients' end, its state. :mod:`deeper` reads the insertions off
and writes the text of any depth; a report is then read off that text as off any other.

A sign never holds the number of a block. It holds which block of the pattern it belongs to, and
the number stands beside it (its round), so that the texts of two depths have signs in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .devices import device as facts_of
from .ledger import CATEGORIES, COUNTS

if TYPE_CHECKING:
    from .ledger import Ledger

TICK, BIRTH, DEATH, PHASE, SINCE = range(5)

#: module path -> (the path without the number of its block, the number; -1 where it has none)
Label = Callable[[str], tuple[str, int]]


class Sign(NamedTuple):
    """One thing that happens. A tick begins the next event; `phase` of PHASE is what begins.

    nth: of a death, which of those alive that were born by the same sign: counted from the first,
        or (-1, -2...) from the last where that is nearer. Only where an allocator is replayed.
    """

    kind: int
    bytes: int = 0
    category: str = ""
    module: str = ""
    phase: str = ""
    device: str = ""
    nth: int = 0


class Signs:
    """The alphabet that streams of one family share: sign <-> number."""

    def __init__(self) -> None:
        self.known: list[Sign] = []
        self._numbers: dict[Sign, int] = {}

    def number(self, sign: Sign) -> int:
        n = self._numbers.setdefault(sign, len(self.known))
        if n == len(self.known):
            self.known.append(sign)
        return n


@dataclass
class Stream:
    """signs: numbers in `alphabet`. rounds: of each sign's module, -1 where it has none.

    costs: figure -> phase -> amount, of the last step (empty where nobody counted).
    counts: whole numbers that a report carries (trainable, adapter_bytes).
    facts: what it says besides (device, recipe, notes, ...).
    """

    alphabet: Signs
    signs: np.ndarray
    rounds: np.ndarray
    costs: dict[str, dict[str, float]]
    counts: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ledger: Ledger, *, since: int = 0, device: str | None = None,
           label: str | None = None, counts: Mapping[str, int] | None = None,
           alphabet: Signs | None = None, module: Label | None = None, **facts: Any) -> Stream:
        """Everything the ledger knows. since: the event at which the last step began. device:
        whose memory is reported (default: the accelerator's, if there is one). label: the device
        type it stands for. module: how paths are split into sign and round."""
        alphabet = alphabet or Signs()
        split = _once(module or (lambda path: (path, -1)))
        lives = list(ledger.lived())
        device = device or _busiest(lives)
        births: list[list[tuple[int, int]]] = [[] for _ in range(ledger.now + 2)]
        deaths: list[list[tuple[int, int]]] = [[] for _ in range(ledger.now + 2)]
        told_apart = facts_of(label or device).caches
        born: list[list[tuple[int, int, int]]] = [[] for _ in births]
        for n, (e, category, birth, death) in enumerate(lives):
            path, turn = split(e.module)
            sign = Sign(BIRTH, e.bytes, category, path, e.phase, e.device)
            births[birth].append((alphabet.number(sign), turn))
            if told_apart:
                born[birth].append((alphabet.number(sign), turn, n))
                deaths[death].append((n, turn))
            else:
                deaths[death].append((alphabet.number(sign._replace(kind=DEATH)), turn))
        if told_apart:
            deaths = _apart(alphabet, born, deaths)
        begins = [(n, Sign(PHASE, phase=p)) for p, n in ledger.phases] + [(since, Sign(SINCE))]
        marks: dict[int, list[tuple[int, int]]] = {}
        for n, sign in begins:
            marks.setdefault(n, []).append((alphabet.number(sign), -1))
        tick = (alphabet.number(Sign(TICK)), -1)
        text: list[tuple[int, int]] = []
        for event in range(ledger.now + 1):
            text += [tick] if event else []
            text += marks.get(event, [])
            text += births[event]
            text += deaths[event]
        if since > ledger.now:
            text += marks[since]
        both = np.array(text, dtype=np.int64).reshape(-1, 2)
        costs = {n: dict(getattr(ledger, n)) for n in COUNTS}
        return cls(alphabet, both[:, 0].copy(), both[:, 1].copy(), costs if ledger.count else {},
                   dict(counts or {}), {**facts, "device": device, "label": label,
                                        "notes": [*ledger.notes, *facts.get("notes", ())]})

    def with_facts(self, **facts: Any) -> Stream:
        return replace(self, facts={**self.facts, **facts})


class Reading:
    """What a stream says, event by event. path: (sign's module, round) -> module path."""

    def __init__(self, stream: Stream, path: Callable[[str, int], str] | None = None):
        self.stream, self.path = stream, path or (lambda module, turn: module)
        known = stream.alphabet.known
        kinds = np.array([s.kind for s in known], dtype=np.int64)
        devices = sorted({s.device for s in known if s.device})
        where = {d: n for n, d in enumerate(devices)} | {"": -1}
        which = {c: n for n, c in enumerate(CATEGORIES)} | {"": -1}
        self.facts = facts_of(stream.facts["label"] or stream.facts["device"])
        block = self.facts.block
        sizes = [-(-s.bytes // block) * block if s.device == stream.facts["device"] else s.bytes
                 for s in known]
        self.kinds = kinds[stream.signs]
        self.events = np.cumsum(self.kinds == TICK)
        self.change = (np.array(sizes, dtype=np.int64) * np.select(
            [kinds == BIRTH, kinds == DEATH], [1, -1], 0))[stream.signs]
        self.devices = np.array([where[s.device] for s in known])[stream.signs]
        self.categories = np.array([which[s.category] for s in known])[stream.signs]
        self.here = where.get(stream.facts["device"], -2)
        self.names = devices
        self.length = int(self.events[-1]) + 1 if len(self.events) else 0

    def curve(self, chosen: np.ndarray) -> np.ndarray:
        """Bytes at each event of the things `chosen`."""
        deltas = np.zeros(self.length, dtype=np.int64)
        np.add.at(deltas, self.events[chosen], self.change[chosen])
        return np.cumsum(deltas)

    def curves(self) -> dict[str, np.ndarray]:
        return {c: self.curve((self.devices == self.here) & (self.categories == n))
                for n, c in enumerate(CATEGORIES)}

    def elsewhere(self) -> dict[str, int]:
        """The most that lived on each other device."""
        return {name: int(self.curve(self.devices == n).max())
                for n, name in enumerate(self.names)
                if n != self.here and (self.devices == n).any()}

    def modules(self, event: int) -> dict[str, int]:
        """Bytes alive at `event` by module; what was added to a module counts as it."""
        until = (self.events <= event) & (self.devices == self.here) & (self.change != 0)
        pairs = np.stack([self.stream.signs[until], self.stream.rounds[until]], axis=1)
        out: dict[str, int] = {}
        if not len(pairs):
            return out
        found, inverse = np.unique(pairs, axis=0, return_inverse=True)
        sums = np.zeros(len(found), dtype=np.int64)
        np.add.at(sums, inverse.reshape(-1), self.change[until])
        for (sign, turn), held in zip(found.tolist(), sums.tolist(), strict=True):
            module = self.path(self.stream.alphabet.known[sign].module, turn)
            owner = module.partition(".burnish")[0]
            out[owner] = out.get(owner, 0) + held
        return {m: b for m, b in sorted(out.items(), key=lambda kv: -kv[1]) if b}

    def last_born(self, event: int) -> tuple[str, str]:
        """(phase, module) of the thing whose birth led to the state at `event`."""
        born = np.flatnonzero((self.kinds == BIRTH) & (self.events <= event))
        if not len(born):
            return "load", ""
        first = born[np.searchsorted(self.events[born], self.events[born[-1]])]
        sign = self.stream.alphabet.known[self.stream.signs[first]]
        return sign.phase, self.path(sign.module, int(self.stream.rounds[first]))

    def lives(self) -> Iterator[tuple[int, int, int]]:
        """(bytes, first event, one past the last) of what lived here, in the order of births; what
        stays ends one past the last event."""
        known = self.stream.alphabet.known
        numbers = {s: n for n, s in enumerate(known)}
        begun = {n: numbers[s._replace(kind=BIRTH, nth=0)] for n, s in enumerate(known)
                 if s.kind == DEATH}
        alive: dict[tuple[int, int], list[int]] = {}
        out: list[tuple[int, int, int]] = []
        at = np.flatnonzero((self.change != 0) & (self.devices == self.here))
        for number, turn, event in zip(self.stream.signs[at].tolist(),
                                       self.stream.rounds[at].tolist(),
                                       self.events[at].tolist(), strict=True):
            sign = known[number]
            if sign.kind == BIRTH:
                alive.setdefault((number, turn), []).append(len(out))
                out.append((sign.bytes, event, self.length))
            else:
                n = alive[begun[number], turn].pop(sign.nth)
                out[n] = (*out[n][:2], event)
        return iter(out)

    def since(self) -> int:
        return int(self.events[self.kinds == SINCE][0])

    def phases(self) -> list[tuple[str, int]]:
        known, since = self.stream.alphabet.known, self.since()
        at = np.flatnonzero(self.kinds == PHASE)
        found = [(known[self.stream.signs[n]].phase, int(self.events[n])) for n in at]
        return [(p, n) for p, n in found if n >= since]


def _apart(alphabet: Signs, born: list[list[tuple[int, int, int]]],
           deaths: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Deaths (of the n-th thing) as signs that say which of those alive and alike it was."""
    alive: dict[tuple[int, int], list[int]] = {}
    signs: dict[int, int] = {}
    out: list[list[tuple[int, int]]] = []
    for begins, ends in zip(born, deaths, strict=True):
        for number, turn, n in begins:
            alive.setdefault((number, turn), []).append(n)
            signs[n] = number
        told = []
        for n, turn in ends:
            alike = alive[signs[n], turn]
            at = alike.index(n)
            nth = at if at <= len(alike) - 1 - at else at - len(alike)
            del alike[at]
            told.append((alphabet.number(alphabet.known[signs[n]]._replace(kind=DEATH, nth=nth)),
                         turn))
        out.append(told)
    return out


def _once(split: Label) -> Label:
    known: dict[str, tuple[str, int]] = {}

    def cached(path: str) -> tuple[str, int]:
        if path not in known:
            known[path] = split(path)
        return known[path]

    return cached


def _busiest(lives: list[Any]) -> str:
    """The device type that computes: the accelerator, where anything at all lives on one."""
    held: dict[str, int] = {}
    for e, *_ in lives:
        held[e.device] = held.get(e.device, 0) + e.bytes
    held.pop("meta", None)
    return max(held, key=lambda d: (d != "cpu", held[d]), default="cpu")
