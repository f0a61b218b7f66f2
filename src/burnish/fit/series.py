"""Rows in time order: which columns are numbers, which say the time and the series, and where a
series is cut for validation.

A canonical row is one whole series: ``series`` its name, ``values`` (steps, channels), and
``begin``, the first step that may be foretold. What is set aside keeps the steps before it, which
a forecast reads.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, DataError, nearest
from ..core.reading import plain
from .readings import ASIDE, number
from .table import Table

if TYPE_CHECKING:
    import datasets

#: names that people give the time of a row, and the series it belongs to
TIME = ("time", "date", "timestamp", "datetime", "ds")
SERIES = ("series_id", "unique_id", "item_id")
#: columns that count rows and say nothing
_COUNTED = ASIDE | {"", "unnamed: 0"}
#: with a label no row is a step of a series unless somebody says so
_LABELS = frozenset({"label", "labels", "class", "category"})


def parts(table: Table) -> tuple[str | None, str | None, tuple[str, ...]]:
    """(column of the time, of the series, all others that are not aside)."""
    lower = {n.lower(): n for n in reversed(list(table.columns))}
    time, series = (next((lower[w] for w in names if w in lower), None)
                    for names in (TIME, SERIES))
    return time, series, tuple(n for n in table.columns
                               if n not in (time, series) and n.lower() not in _COUNTED)


def recognised(table: Table) -> bool:
    """Whether columns say by themselves that rows are steps: a time, and numbers beside it."""
    time, _, rest = parts(table)
    return time is not None and bool(rest) and not any(n.lower() in _LABELS for n in rest) and all(
        number(table.columns[n][0]) is not None for n in rest)


def named(text: str) -> tuple[str, ...]:
    """Names of columns in a flag, between commas as in a CSV."""
    return tuple(n.strip() for n in next(csv.reader([text])))


def listed(names: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(names)
    return out.getvalue()


def channels(table: Table, label: str | None) -> tuple[str, ...]:
    """The columns of numbers: those named, or all but the time, the series and what is aside."""
    if label is None:
        found = parts(table)[2]
        if not found:
            raise DataError(f"no column holds numbers; the data has {', '.join(table.columns)}")
        return found
    for name in (found := named(label)):
        if name not in table.columns:
            raise DataError(f"label names {name!r}, which is no column of the data; it has "
                            f"{', '.join(table.columns)}{nearest(name, table.columns)}")
    return found


# -- values --------------------------------------------------------------------------------------
def moment(value: Any) -> float | None:
    """When a row is, in seconds or in whatever its numbers count; None where it cannot be told."""
    if (x := number(value)) is not None:
        return x
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    apart = value.utcoffset() or timedelta(0)
    return (value.replace(tzinfo=None) - apart - datetime(1970, 1, 1)).total_seconds()


def numbers(row: Sequence[Any], names: Sequence[str], where: str) -> list[float]:
    """The values of a step. Raises DataError with the row and the field of what is no number."""
    out = []
    for value, name in zip(row, names, strict=True):
        x = number(value)
        if x is None or not math.isfinite(x):
            empty = value is None or isinstance(value, str) and not value.strip()
            raise DataError(f"{where}, field {name!r}: " + (
                "the value is missing; fill it in, or leave the row out" if empty else
                f"{plain(value, 40)!r} is no number; leave the column out, or name those that are "
                "foretold with label="))
        out.append(x)
    return out


def together(table: Table, names: Sequence[str], time: str | None, series: str | None
             ) -> dict[str, tuple[list[list[float]], list[Any]]]:
    """series -> (its values, its times), in the order of the rows.

    Raises DataError with the row where a value is no number, or a time is not after the one before.
    """
    for name in (*names, *filter(None, (time, series))):
        if name not in table.columns:
            raise DataError(f"{table.where(0)}: there is no column {name!r}; it has "
                            f"{plain(', '.join(table.columns), 120)}")
    found: dict[str, tuple[list[list[float]], list[Any]]] = {}
    wanted = [table.columns[n] for n in names]
    for i, row in enumerate(zip(*wanted, strict=True)):
        of = "" if series is None else str(table.columns[series][i])
        values, times = found.setdefault(of, ([], []))
        values.append(numbers(row, names, table.where(i)))
        if time is None:
            continue
        at = table.columns[time][i]
        before, now = moment(times[-1]) if times else None, moment(at)
        if before is not None and now is not None and now <= before:
            raise DataError(f"{table.where(i)}, field {time!r}: {plain(at, 40)} is " + (
                f"before {plain(times[-1], 40)}, of the row above; sort the rows in time"
                if now < before else "the time of the row above too; where rows are of several "
                "series, a column series_id says of which"))
        times.append(at)
    return found


def canonical(table: Table, roles: Any) -> datasets.Dataset:
    """One row for each series."""
    import datasets

    found = together(table, roles.channels, roles.time, roles.series)
    step = datasets.List(datasets.Value("float64"))
    return datasets.Dataset.from_dict(
        {"series": list(found), "values": [v for v, _ in found.values()],
         "begin": [0] * len(found)},
        features=datasets.Features({"series": datasets.Value("string"),
                                    "values": datasets.List(step),
                                    "begin": datasets.Value("int64")}))


def steps(rows: Any) -> int:
    """Steps that may be foretold, of all series."""
    return sum(len(r["values"]) - r["begin"] for r in rows)


def where(rows: Any) -> Callable[[int], str]:
    names = rows["series"][:]
    return lambda i: f"series {names[i]!r}" if names[i] else "the series"


def set_aside(rows: Any, part: float | int) -> tuple[Any, Any]:
    """(training rows, validation): of each series the last steps. One that is no longer than what
    would be taken stays whole. Raises ConfigError where that are all."""
    early, late = [], []
    for row in rows:
        size = len(row["values"])
        count = int(part) if part >= 1 else max(1, round(size * part))
        if count < size:
            late.append({**row, "begin": size - count})
        early.append({**row, "values": row["values"][:size - count] if count < size
                      else row["values"]})
    if not late:
        raise ConfigError(f"validation={part} would take all rows of every series")
    made = type(rows).from_list
    return made(early, features=rows.features), made(late, features=rows.features)


# -- what comes after ----------------------------------------------------------------------------
def following(times: Sequence[Any], count: int) -> list[str] | None:
    """The next times, where the last ones are evenly apart; None where they are not."""
    last = times[-8:]
    at: list[Any] = [moment(t) for t in last]
    if len(at) < 3 or None in at:
        return None
    gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
    if max(gaps) - min(gaps) > 1e-9 * max(1.0, abs(at[-1])):
        return None
    end = last[-1]
    if number(end) is not None:
        return [f"{at[-1] + gaps[-1] * k:.12g}" for k in range(1, count + 1)]
    begun = datetime.fromisoformat(end.strip()) if isinstance(end, str) else end
    if not isinstance(begun, datetime):
        begun = datetime(begun.year, begun.month, begun.day)
    after = [begun + timedelta(seconds=gaps[-1] * k) for k in range(1, count + 1)]
    days = len(str(end).strip()) == 10 and gaps[-1] % 86400 == 0
    how = {"sep": " " if " " in str(end) else "T",
           "timespec": "minutes" if len(str(end).strip()) == 16 else "auto"}
    return [f"{t:%Y-%m-%d}" if days else t.isoformat(**how) for t in after]
