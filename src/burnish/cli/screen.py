"""What a command shows: a table for people, or one JSON document for programs."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any


def emit(as_json: bool, data: Any, text: str) -> None:
    """Print `data` as JSON, or `text`."""
    if as_json:
        json.dump(plain(data), sys.stdout, indent=2, sort_keys=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(folded(text.rstrip("\n")) + "\n")


def say(text: str) -> None:
    """Print text for people at once."""
    print(folded(text), flush=True)


def folded(text: str) -> str:
    """What of a line is beyond eighty columns stands below it, set in. Rows of a page in Markdown
    and the lines of a command that a shell joins stay as they are: a path in it may have spaces."""
    out, joined = [], False
    for line in text.split("\n"):
        whole = joined or line.endswith(" \\") or line.startswith("|") or len(line) <= WIDTH
        out.append(line if whole else hung(line, len(line) - len(line.lstrip()) + 2))
        joined = line.endswith(" \\")
    return "\n".join(out)


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
    """Aligned columns; those whose index is in `right` are flush right and stay on one line.

    What is wider than eighty columns wraps where there are words; columns that even so find no room
    follow below, beside the first once more.
    """
    cells = [[str(c) for c in row] for row in (head, *rows)]
    flush = set(right)
    return "\n\n".join(_part(cells, part, flush) for part in _parts(cells, flush))


def fitted(text: str) -> str:
    """Prose within eighty columns: a paragraph with a longer line is filled anew where all of it is
    set in alike, and otherwise line by line."""
    out = []
    for part in text.split("\n\n"):
        lines = part.splitlines()
        inset = {len(line) - len(line.lstrip()) for line in lines}
        if max(map(len, lines), default=0) <= WIDTH:
            out.append(part)
        elif len(inset) == 1:
            out.append(_filled(" ".join(line.strip() for line in lines), inset.pop()))
        else:
            out.append("\n".join(_filled(line, len(line) - len(line.lstrip()))
                                 if len(line) > WIDTH else line for line in lines))
    return "\n\n".join(out)


def hung(line: str, inset: int) -> str:
    """One line, and what is beyond eighty columns of it below, set in."""
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * inset, break_long_words=False,
                         break_on_hyphens=False)


def _filled(line: str, inset: int) -> str:
    return textwrap.fill(line.strip(), WIDTH, initial_indent=" " * inset,
                         subsequent_indent=" " * inset, break_long_words=False,
                         break_on_hyphens=False)


#: columns of a screen, and what a column of words is not wrapped below
WIDTH, WORDS = 80, 24


def _widths(cells: list[list[str]], flush: set[int]) -> list[tuple[int, int]]:
    """Of each column its width, and the least that it can be wrapped to."""
    out = []
    for i, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        word = max((len(w) for c in column for w in c.split()), default=0)
        out.append((width, width if i in flush else min(width, max(WORDS, word + 2))))
    return out


def _parts(cells: list[list[str]], flush: set[int]) -> list[list[int]]:
    """Which columns stand beside each other."""
    least = [n for _, n in _widths(cells, flush)]
    parts = [[0]]
    for i in range(1, len(least)):
        if len(parts[-1]) > 1 and sum(least[j] + 2 for j in [*parts[-1], i]) - 2 > WIDTH:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _part(cells: list[list[str]], part: list[int], flush: set[int]) -> str:
    of = _widths(cells, flush)
    widths = {i: of[i][0] for i in part}
    while sum(w + 2 for w in widths.values()) - 2 > WIDTH:
        loose = [i for i in part if widths[i] > of[i][1]]
        if not loose:                                # a single word that is wider than a screen
            break
        widths[max(loose, key=widths.__getitem__)] -= 1

    def lines(row: list[str]) -> list[str]:
        inside = [[row[i]] if len(row[i]) <= w else textwrap.wrap(
            " ".join(row[i].split()), w, subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False) for i, w in widths.items()]
        return ["  ".join(c.rjust(w) if i in flush else c.ljust(w) for c, (i, w)
                          in zip(line, widths.items(), strict=True)).rstrip()
                for line in zip_longest(*inside, fillvalue="")]

    first, *others = [lines(row) for row in cells]
    rule = "  ".join("-" * w for w in widths.values())
    return "\n".join([*first, rule, *(line for row in others for line in row)])
