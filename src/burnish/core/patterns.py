"""Regular expressions that came with a file, or from anybody, matched in bounded time.

Python's own matcher goes back over what it tried: ``(.*)*x`` on thirty letters outlives the
universe. Here a pattern is read by Python's parser and matched as a *set* of places: each part of
it maps the places where it may begin to the places where it may end. A repeat is the smallest set
that no further round enlarges, so nothing is tried twice.

All of Python's syntax that asks only whether a text matches is understood, lookaround included.
References to what a group matched (``\\1``) are refused, since they are what sets cannot say; so
is a pattern whose matching takes more than a fixed number of steps.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .errors import ConfigError

try:
    from re import _constants as _c  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:                                  # Python 3.10
    import sre_constants as _c  # type: ignore[no-redef]
    import sre_parse as _parser  # type: ignore[no-redef]

#: longest pattern, and most steps for one text: some seconds of the slowest computer
LENGTH, STEPS = 100_000, 1_000_000

_FEW = re.IGNORECASE | re.DOTALL | re.MULTILINE | re.UNICODE | re.VERBOSE | re.ASCII


class Pattern:
    """A compiled pattern. Raises ConfigError, one line, for what is no pattern or not bounded."""

    def __init__(self, text: str):
        self.text = text
        if len(text) > LENGTH:
            raise ConfigError(f"a pattern of {len(text)} characters is too long (at most {LENGTH})")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # a possible set operation, an odd escape
                tree = _parser.parse(text)
        except (re.error, ValueError, OverflowError, IndexError) as e:
            raise ConfigError(f"{_short(text)} is no regular expression: {e}") from None
        except (RecursionError, MemoryError):
            raise ConfigError(f"{_short(text)} is nested too deeply") from None
        self.flags = tree.state.flags & _FEW
        self.tree = list(tree)

    def fullmatch(self, text: str) -> bool:
        """Does the whole of `text` match?"""
        return len(text) in _Walk(self, text).run(self.tree, {0}, self.flags)

    def match(self, text: str) -> bool:
        """Does `text` begin with a match?"""
        return bool(_Walk(self, text).run(self.tree, {0}, self.flags))


class _Walk:
    """One pattern over one text: places are positions 0 .. len(text)."""

    def __init__(self, pattern: Pattern, text: str):
        self.pattern, self.text, self.left = pattern, text, STEPS

    def run(self, parts: Iterable[Any], places: set[int], flags: int) -> set[int]:
        """Where `parts`, one after another, may end when they begin at any of `places`."""
        try:
            for op, arg in parts:
                if not places:
                    break
                self.left -= len(places)
                if self.left < 0:
                    raise ConfigError(f"{_short(self.pattern.text)} takes too long to match; "
                                      "write it without repeats of repeats")
                places = self.one(op, arg, places, flags)
        except RecursionError:
            raise ConfigError(f"{_short(self.pattern.text)} is nested too deeply") from None
        return places

    def one(self, op: Any, arg: Any, places: set[int], flags: int) -> set[int]:
        if op in _LETTERS:
            good = _letter(op, arg, flags)
            n = len(self.text)
            return {i + 1 for i in places if i < n and good(self.text[i])}
        if op is _c.BRANCH:
            return set().union(*(self.run(b, places, flags) for b in arg[1]))
        if op is _c.SUBPATTERN:
            _, add, drop, inner = arg
            return self.run(inner, places, (flags | add) & ~drop)
        if op in _REPEATS:
            low, high, inner = arg
            return self.repeat(inner, low, high, places, flags)
        if op is _c.AT:
            return {i for i in places if self.at(arg, i, flags)}
        if op in (_c.ASSERT, _c.ASSERT_NOT):
            side, inner = arg
            wanted = op is _c.ASSERT
            return {i for i in places if self.around(side, inner, i, flags) is wanted}
        if op is getattr(_c, "ATOMIC_GROUP", None):
            raise self.refused("an atomic group")
        if op in (_c.GROUPREF, getattr(_c, "GROUPREF_EXISTS", None)):
            raise self.refused("a reference to a group")
        if op is getattr(_c, "FAILURE", None):
            return set()
        raise self.refused(str(op).lower())

    def repeat(self, inner: Any, low: int, high: int, places: set[int], flags: int) -> set[int]:
        endless = high == _c.MAXREPEAT
        for _ in range(int(low)):
            after = self.run(inner, places, flags)
            if after == places:                      # and so it stays
                break
            places = after
            if not places:
                return places
        found, new, rounds = set(places), places, 0
        while new and (endless or rounds < int(high) - int(low)):
            new = self.run(inner, new, flags) - found
            found |= new
            rounds += 1
        return found

    def at(self, where: Any, i: int, flags: int) -> bool:
        text, n = self.text, len(self.text)
        if where is _c.AT_BEGINNING:
            return i == 0 or bool(flags & re.MULTILINE and text[i - 1] == "\n")
        if where is _c.AT_BEGINNING_STRING:
            return i == 0
        if where is _c.AT_END:
            return i == n or (i == n - 1 and text[i] == "\n") or \
                bool(flags & re.MULTILINE and text[i] == "\n")
        if where is _c.AT_END_STRING:
            return i == n
        word = _category("WORD", flags)
        edge = (i > 0 and word(text[i - 1])) != (i < n and word(text[i]))
        return edge if where is _c.AT_BOUNDARY else not edge

    def around(self, side: int, inner: Any, i: int, flags: int) -> bool:
        if side > 0:
            return bool(self.run(inner, {i}, flags))
        low, high = inner.getwidth()
        return any(i in self.run(inner, {i - w}, flags) for w in range(low, min(high, i) + 1))

    def refused(self, what: str) -> ConfigError:
        return ConfigError(f"{_short(self.pattern.text)} holds {what}, which burnish does not "
                           "match; write it without")


_LETTERS = (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN)
_REPEATS = (_c.MAX_REPEAT, _c.MIN_REPEAT)


def _letter(op: Any, arg: Any, flags: int) -> Callable[[str], bool]:
    """Does one character match a literal, a dot or a set?"""
    fold = (lambda c: {c, c.lower(), c.upper()}) if flags & re.IGNORECASE else (lambda c: {c})
    if op is _c.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if op is _c.LITERAL:
        return lambda c: bool(fold(c) & fold(chr(arg)))
    if op is _c.NOT_LITERAL:
        return lambda c: not fold(c) & fold(chr(arg))
    items = list(arg)
    turned = bool(items) and items[0][0] is _c.NEGATE

    def inside(c: str) -> bool:
        for kind, what in items:
            if kind is _c.LITERAL and fold(c) & fold(chr(what)):
                return True
            if kind is _c.RANGE and any(what[0] <= ord(x) <= what[1] for x in fold(c)
                                        if len(x) == 1):
                return True
            if kind is _c.CATEGORY:
                name = str(what).removeprefix("CATEGORY_")
                if _category(name.removeprefix("NOT_"), flags)(c) is not name.startswith("NOT_"):
                    return True
        return False

    return lambda c: inside(c) is not turned


def _category(name: str, flags: int) -> Callable[[str], bool]:
    plain = re.compile({"WORD": r"\w", "DIGIT": r"\d", "SPACE": r"\s"}[name],
                       flags & re.ASCII)
    return lambda c: plain.match(c) is not None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
