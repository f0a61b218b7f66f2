"""Columns that are keys of context: what a recipe reads beside the rows (core/keys.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from ..core.errors import DataError, nearest
from ..core.keys import Read
from .table import Table


def apart(table: Table, split: str, keys: Mapping[str, Read], optional: Collection[str]
          ) -> tuple[Table, dict[str, list[float]]]:
    """The table without its columns of keys, and their entries as numbers.

    Raises DataError for a key without a column (but for `optional` ones), and for an entry out of
    its range, with the row.
    """
    found: dict[str, list[float]] = {}
    for name, read in keys.items():
        if name in table.columns:
            found[name] = [_entry(v, read, f"{table.where(i)}, field {name!r}")
                           for i, v in enumerate(table.columns[name])]
        elif name not in optional:
            raise DataError(missing(read, name, f"the split {split}", table.columns))
    left = {k: v for k, v in table.columns.items() if k not in found}
    return (replace(table, columns=left) if found else table), found


def told_apart(table: Table, name: str) -> list[str]:
    """The column that ``group=`` names, as text. Raises DataError where there is none, or no
    value in it."""
    if name not in table.columns:
        raise DataError(f"group={name!r} is no column of the data; it has "
                        f"{', '.join(table.columns)}{nearest(name, table.columns)}")
    for i, value in enumerate(table.columns[name]):
        if value is None or isinstance(value, list | dict) or not str(value).strip():
            raise DataError(f"{table.where(i)}, field {name!r}: expected a word or a number, it is "
                            f"{'missing' if value is None else repr(value)}")
    return [str(v) for v in table.columns[name]]


def without(table: Table, name: str) -> Table:
    """The other columns."""
    return replace(table, columns={k: v for k, v in table.columns.items() if k != name})


def missing(read: Read, name: str, source: str, has: Iterable[str]) -> str:
    """What to say of a key that the data lacks."""
    has = list(has)
    return (f"{read.part} reads {name!r} ({read.key.meaning}) of every row, and {source} has no "
            f"such column; it has {', '.join(has)}{nearest(name, has)}")


def _entry(value: object, read: Read, at: str) -> float:
    """3, 3.0 and "3" are one entry."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool):
        number = float(value)
    if read.key.shape or not read.takes(number):
        kind = "number" if read.key.real else "whole number"
        raise DataError(f"{at}: {read.part} reads {read.key.meaning}, a {kind} {read.range}; "
                        f"it is {value!r}")
    return number if read.key.real else int(number)
