"""Columns that can be read in more than one way: which ways, and which flags choose each.

A guess that trains the wrong thing costs hours and says nothing, so where the names do not decide,
the person does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from .table import Table

#: columns that come along and hold nothing to learn
ASIDE = frozenset({
    "id", "idx", "index", "uid", "guid", "uuid", "url", "link", "source", "date", "time",
    "timestamp", "created", "meta", "metadata", "lang", "language", "split", "file", "path"})
#: what is answered and what answers it, as data sets call them; likeliest first
ANSWERED = (("instruction", "response"), ("prompt", "response"), ("question", "answer"),
            ("query", "response"), ("input", "output"), ("source", "target"),
            ("document", "summary"), ("article", "highlights"), ("dialogue", "summary"),
            ("text", "summary"))
#: names that a column of words, one by one, has
WORDS = ("tokens", "words")
_LOOKED_AT = 200


@dataclass(frozen=True)
class Reading:
    """One way to read the columns: the flags that choose it, and what is learnt then."""

    flags: tuple[tuple[str, str], ...]
    learns: str

    def __str__(self) -> str:
        return f"{', '.join(f'{k}={v!r}' for k, v in self.flags)} {self.learns}"


class AmbiguousError(DataError):
    """Columns with several readings; `readings` holds them, likeliest first."""

    def __init__(self, at: str, message: str, readings: tuple[Reading, ...] = ()):
        super().__init__(f"{at}: {message}")
        self.at, self.readings = at, readings


def tagged(table: Table, text: str | None = None, label: str | None = None
           ) -> list[tuple[str, str]]:
    """Pairs of columns of words, one by one, and of a tag for each. More than one: a choice."""
    lists = {n: [v for v in values[:_LOOKED_AT] if v is not None]
             for n, values in table.columns.items()}
    lists = {n: v for n, v in lists.items() if v and all(isinstance(x, list) for x in v)}
    spoken = [n for n, rows in lists.items() if any(rows) and all(
        isinstance(x, str) for row in rows for x in row)]
    words = [text] if text in spoken else [] if text else (
        [n for n in spoken if n.lower() in WORDS] or [])
    found = []
    for w in words:
        # a row that has a tag too few is named later, not taken for another kind of data
        marks = [n for n, rows in lists.items() if n != w and 2 * sum(
            len(a) == len(b) for a, b in zip(rows, lists[w], strict=False)) > len(rows)]
        found += [(w, n) for n in ([label] if label in lists else [] if label else marks)]
    return found


def heard_or_written(table: Table, label: str, text: str) -> AmbiguousError:
    """Recordings with a label and with what is said in them: either may be learnt."""
    ways = (Reading((("text", text),), f"learns to write down the {text}"),
            Reading((("label", label),), f"learns to tell the {label} of a sound"))
    return AmbiguousError(table.where(0).partition(", ")[0],
                          f"its recordings have a {label} and a {text}; say which is learnt: "
                          f"{'; or '.join(map(str, ways))}", ways)


def pictures(values: list[Any]) -> bool:
    """Whether a column holds pictures: opened ones, encoded ones, or paths of such."""
    from .media import PICTURE

    seen = next((v for v in values if v is not None), None)
    if isinstance(seen, dict):
        seen = seen.get("path") or seen.get("bytes")
    return hasattr(seen, "convert") or isinstance(seen, bytes) or (
        isinstance(seen, str) and PICTURE.is_one(seen))


def aside(name: str) -> bool:
    return name.lower() in ASIDE or name.lower().endswith(("_id", "_url"))


def texts(table: Table) -> list[str]:
    """Columns of words, the longest first."""
    size = {}
    for name, values in table.columns.items():
        seen = [v for v in values[:_LOOKED_AT] if v is not None]
        if seen and not aside(name) and all(isinstance(v, str) for v in seen) and any(
                number(v) is None for v in seen):
            size[name] = sum(map(len, seen)) / len(seen)
    return sorted(size, key=lambda n: -size[n])


def marks(values: list[Any]) -> bool:
    """Whether a column is of 1 and 0 and nothing else."""
    return bool(values) and all(str(v).strip() in ("0", "1") for v in values)


def label_like(table: Table, name: str) -> bool:
    """Few different values, all short names or whole numbers."""
    seen = [v for v in table.columns[name] if v is not None]
    if not seen or not all(isinstance(v, str | int | bool) for v in seen):
        return False
    kinds = {str(v).strip() for v in seen}
    short = all(len(k) <= 40 and k.count(" ") < 4 for k in kinds)
    return 2 <= len(kinds) <= max(2, min(len(seen) // 2, 200)) and short and not aside(name)


def ambiguous(table: Table) -> AmbiguousError | DataError:
    """What to say of a table whose names do not decide. Likeliest readings first."""
    names, at = list(table.columns), table.where(0).partition(", ")[0]
    listed = ", ".join(names)
    if len(pairs := tagged(table)) > 1:
        ways = tuple(Reading((("text", w), ("label", t)), f"learns the {t} of {w}")
                     for w, t in pairs)
        return AmbiguousError(at, f"its columns ({listed}) can be read in more than one way; say "
                                  f"which: {'; or '.join(map(str, ways))}", ways)
    words = texts(table)
    labels = [n for n in names if label_like(table, n)]
    found = []
    text = next((w for w in words if w not in labels), words[0] if words else None)
    for label in labels[:2]:
        if text is not None and label != text:
            found.append(Reading((("text", text), ("label", label)),
                                 f"learns to tell {label} from {text}"))
    both = ("prompt", "completion") if {"prompt", "completion"} <= set(names) else None
    if both:
        found = [Reading((("task", "unpaired-preference-tuning"), ("label", n)),
                         f"learns to answer as those do that {n} calls good (1)")
                 for n in labels if marks(table.columns[n])] + found
    known = both or next((p for p in ANSWERED if set(p) <= set(words)), None)
    longer = known or sorted([w for w in words if w not in labels][:2], key=names.index)
    if len(longer) == 2:
        found.append(Reading((("prompt", longer[0]), ("completion", longer[1])),
                             f"learns to answer {longer[0]} with {longer[1]}"))
    if text is not None:
        found.append(Reading((("task", "language-modelling"), ("text", text)),
                             f"learns to write such {text}"))
    if not found and (numbers := tabular(table)) is not None:
        return numbers
    if not found:
        return DataError(f"{at}: cannot tell what the columns mean: {listed}; name them with "
                         "text=, label=, image=, audio=, or prompt= and completion=")
    ways = "; or ".join(map(str, found))
    return AmbiguousError(at, f"its columns ({listed}) can be read in more than one way; say "
                              f"which: {ways}", tuple(found))


def number(value: Any) -> float | None:
    """A value as a number, as tables write them; None where it is none. True is none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def tabular(table: Table, label: str | None = None) -> AmbiguousError | None:
    """What to say of rows of numbers alone, beside a label perhaps; None of other rows."""
    names = [n for n in table.columns if n != label and not aside(n)]
    if not names or any(number(v) is None for n in names for v in table.columns[n][:1]):
        return None
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    way = Reading((("task", "time-series-forecasting"),), "learns to forecast rows in time order")
    return AmbiguousError(table.where(0).partition(", ")[0], (
        f"its columns are numbers ({listed}), and fit serves no task of tables: a plain module is "
        "tuned on them with burnish.tune and a loop of one's own, as examples/cells.py shows; "
        f"{way}"), (way,))
