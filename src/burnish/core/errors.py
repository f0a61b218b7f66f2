"""What burnish says when something cannot be done.

Every error names what was wrong, what was expected and, where there is one, the nearest right
spelling. The command line turns each class into the exit code written beside it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


class BurnishError(Exception):
    """Base of every error burnish raises on purpose. Exit code 1: the work failed."""

    exit_code = 1


class ConfigError(BurnishError, ValueError):
    """The call or its configuration was wrong (exit code 2)."""

    exit_code = 2


class RecipeError(ConfigError):
    """A recipe names an unknown method or setting, or joins parts that cannot be joined."""


class RankError(RecipeError):
    """A rank that one weight is too small for; among the default targets it is left out."""


class TargetError(ConfigError):
    """A target matches nothing, or only in part."""


class DataError(ConfigError):
    """The data cannot be read as what it claims to be."""


class FormatError(ConfigError):
    """A file is missing, truncated, foreign or does not belong to this base."""


class NoPlanError(BurnishError):
    """No recipe fits the memory asked for (exit code 3)."""

    exit_code = 3


class CheckError(BurnishError):
    """A check failed: something does not train, a merge drifts (exit code 4)."""

    exit_code = 4


class MemoryExceeded(BurnishError, MemoryError):
    """The run itself ran out of memory (exit code 5)."""

    exit_code = 5


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """`", did you mean 'lora'?"` or an empty string: the tail of an error about a name."""
    if not isinstance(word, str) or len(word) > 200:     # nobody misspelt that
        return ""
    names = [str(k) for k in itertools.islice(known, 20_000)]
    close = difflib.get_close_matches(word, names, n=n, cutoff=0.5)
    close.sort(key=lambda name: sorted(name) != sorted(word))    # letters changed places: likeliest
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(c) for c in close)}?"
