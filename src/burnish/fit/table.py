"""Rows as they were read: columns by name, and where each row came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Table:
    """Rows as columns, with a way to say where row i stands (a file and a line, or a path)."""

    columns: dict[str, list[Any]]
    where: Callable[[int], str]
    layout: str
    #: column -> its classes in their order, where the layout itself says them
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: where it stands, from which its paths are read first
    folder: Path | None = None

    def path(self, name: str) -> Path | None:
        """The file that a cell names, from where the table stands or from here; None where there
        is none (a pipe, an address)."""
        places = [self.folder / name] if self.folder is not None else []
        return next((p for p in (*places, Path(name)) if p.is_file()), None)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def rows(self) -> Iterator[dict[str, Any]]:
        names = list(self.columns)
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))
