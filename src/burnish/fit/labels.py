"""What rows are labelled with: a class, several, a number, or a tag for every word."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ..core.errors import DataError, nearest
from .kinds import TASKS
from .table import Table

#: "3.0", which tables make of 3
_WHOLE = re.compile(r"^(-?\d+)\.0+$")

Classes = tuple[str, ...] | None


def fractions(values: Sequence[Any]) -> list[int]:
    """Rows whose label is a number with a fraction, where all that are there are numbers."""
    found = []
    for i, v in enumerate(values):
        if v is None or isinstance(v, bool):
            continue
        try:
            x = float(v)
        except (TypeError, ValueError):
            return []
        if math.isfinite(x) and not x.is_integer():
            found.append(i)
    return found


def quantities(values: Sequence[Any]) -> bool:
    """Whether a column of labels holds numbers to be met, not classes: a tenth of them have
    fractions, three different ones at least. One that strays among classes is a slip."""
    rows = fractions(values)
    return len(rows) >= 0.1 * len(values) and len({float(values[i]) for i in rows}) > 2


def single(given: Sequence[Any], field: str, table: Table, classes: Classes, source: str
           ) -> tuple[list[int], tuple[str, ...]]:
    """Each row's class as its number, and the classes."""
    if rows := fractions(given):
        at = rows[0]
        others = ", ".join(repr(t) for t in TASKS if t.endswith("-regression") and t[0] != "t")
        raise DataError(f"{table.where(at)}, field {field!r}: the label is {given[at]}, a number "
                        f"with a fraction, and no class; task='text-regression' (or {others}) "
                        "learns such numbers, or name another column with label=")
    names = [class_name(v, table.where(i), field) for i, v in enumerate(given)]
    classes = classes or table.classes.get(field) or _classes(names, field, source)
    number = {c: i for i, c in enumerate(classes)}
    return [_number(number, c, table.where(i), field) for i, c in enumerate(names)], classes


def several(given: Sequence[Any], field: str, table: Table, classes: Classes, source: str
            ) -> tuple[list[list[int]], tuple[str, ...]]:
    """Each row's classes as their numbers in order, none perhaps, and all classes."""
    rows = []
    for i, values in enumerate(given):
        if not isinstance(values, list | tuple):
            raise DataError(f"{table.where(i)}, field {field!r}: expected a list of classes, found "
                            f"{'nothing' if values is None else type(values).__name__}")
        rows.append([class_name(v, table.where(i), field) for v in values])
    flat = [c for row in rows for c in row]
    classes = classes or table.classes.get(field) or _classes(flat, field, source, len(rows))
    number = {c: i for i, c in enumerate(classes)}
    return [sorted({_number(number, c, table.where(i), field) for c in row})
            for i, row in enumerate(rows)], classes


def marked(table: Table, names: Sequence[str]) -> list[list[str]]:
    """Columns of ones and noughts, a class each, as lists of the classes that are marked."""
    said = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    rows: list[list[str]] = [[] for _ in range(len(table))]
    for name in names:
        if name not in table.columns:
            raise DataError(f"label names {name!r}, which is no column of the data; it has "
                            f"{', '.join(table.columns)}{nearest(name, table.columns)}")
        for i, v in enumerate(table.columns[name]):
            if (mark := said.get(str(v).strip().lower())) is None:
                raise DataError(f"{table.where(i)}, field {name!r}: expected 1 where the row is of "
                                f"this class and 0 where it is not, found {v!r}")
            if mark:
                rows[i].append(name)
    return rows


def numbers(given: Sequence[Any], field: str, table: Table, limit: float | None = None
            ) -> list[float]:
    """What regression learns. Raises DataError for what is no finite number, and for one beyond
    `limit` to either side."""
    out = []
    for i, v in enumerate(given):
        try:
            x = math.nan if v is None or isinstance(v, bool) else float(v)
        except (TypeError, ValueError):
            x = math.nan
        if not math.isfinite(x):
            raise DataError(f"{table.where(i)}, field {field!r}: expected a number, found {v!r}")
        if limit is not None and abs(x) > limit:
            raise DataError(f"{table.where(i)}, field {field!r}: {v!r} is beyond {limit:g}, and a "
                            "cosine is never; divide the scores first")
        out.append(x)
    return out


def differ(given: Sequence[float], field: str, source: str) -> None:
    """Raises DataError where rows to be trained on all have one number."""
    if len(set(given)) == 1 and len(given) > 1:
        raise DataError(f"{source}, field {field!r}: every row is {given[0]}; there is nothing to "
                        "learn")


def tags(given: Sequence[Any], tokens: Sequence[Sequence[str]], field: str, table: Table,
         classes: Classes, source: str) -> tuple[list[list[int]], tuple[str, ...]]:
    """A tag for each word as its number, and the tags; "O", outside of everything, first."""
    rows = []
    for i, (row, words) in enumerate(zip(given, tokens, strict=True)):
        at = f"{table.where(i)}, field {field!r}"
        if not isinstance(row, list | tuple):
            raise DataError(f"{at}: expected a list of tags, found "
                            f"{'nothing' if row is None else type(row).__name__}")
        if len(row) != len(words):
            raise DataError(f"{at}: {len(row)} tags for {len(words)} words")
        rows.append([class_name(v, table.where(i), field) for v in row])
    flat = [c for row in rows for c in row]
    classes = classes or table.classes.get(field) or tuple(
        sorted(_classes(flat, field, source), key=lambda c: c != "O"))
    number = {c: i for i, c in enumerate(classes)}
    return [[_number(number, c, table.where(i), field) for c in row]
            for i, row in enumerate(rows)], classes


def _number(number: dict[str, int], name: str, where: str, field: str) -> int:
    if name not in number:
        raise DataError(f"{where}, field {field!r}: class {name!r} is not among the training "
                        f"classes{nearest(name, number)}")
    return number[name]


def class_name(value: Any, where: str, field: str) -> str:
    """A class as a name; 3, 3.0 and "3" are one class. Missing, NaN and 3.5 are errors."""
    at = f"{where}, field {field!r}"
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{at}: the label is missing")
    if isinstance(value, str):
        value = value.strip()
        if value.lower() in ("nan", "none", "null", "n/a"):
            raise DataError(f"{at}: the label is {value!r}; name the class, or remove the row")
        return _WHOLE.sub(r"\1", value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            raise DataError(f"{at}: the label is NaN")
        if not value.is_integer() or abs(value) > 2**63:
            raise DataError(f"{at}: the label is {value}; burnish fits classes, and a class is a "
                            "name or a whole number")
        value = int(value)
    if not isinstance(value, int) or abs(value) > 2**63:
        raise DataError(f"{at}: a label is a name or a whole number, not {type(value).__name__}")
    return str(value)


def _classes(given: list[str], field: str, source: str, rows: int | None = None
             ) -> tuple[str, ...]:
    classes, rows = sorted(set(given), key=_numbers_first), rows or len(given)
    if not classes:
        raise DataError(f"{source}: no row of {field!r} names a class")
    if len(classes) < 2:
        raise DataError(f"{source}: every row of {field!r} is {classes[0]!r}; classification needs "
                        "two classes or more")
    if len(classes) > max(50, rows // 2):
        raise DataError(f"{source}: column {field!r} has {len(classes)} different values in "
                        f"{rows} rows, which are no classes; name the label with label=")
    return tuple(classes)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    number = re.fullmatch(r"-?[0-9]{1,18}", name)
    return number is None, int(name) if number else 0, name


