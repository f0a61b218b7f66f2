"""What a command shows: a table for people, or one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def emit(as_json: bool, data: Any, text: str) -> None:
    """Print `data` as JSON, or `text`."""
    if as_json:
        json.dump(plain(data), sys.stdout, indent=2, sort_keys=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(text.rstrip("\n") + "\n")


def check_picture(picture: Path | None) -> None:
    """Refuses a picture that could not be written, before the work that it is of."""
    from ..core.errors import ConfigError
    from ..formats import safe

    if picture is None:
        return
    if picture.suffix != ".svg":
        raise ConfigError(f"--picture {picture}: pictures are SVG; name a file that ends in .svg")
    safe.check_writable(picture)


def plain(value: Any) -> Any:
    """`value` in JSON's types; whatever knows `to_dict` is asked."""
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> str:
    """Aligned columns; those whose index is in `right` are flush right."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    flush = set(right)

    def line(row: list[str]) -> str:
        return "  ".join(c.rjust(w) if i in flush else c.ljust(w)
                         for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])
