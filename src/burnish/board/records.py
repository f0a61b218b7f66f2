"""What runs came to: JSON documents in a folder, one a run, which anybody can add to.

A file is a document (``.json``) or one a line (``.jsonl``). Of two of a run the newer stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, FormatError, RecipeError
from ..core.reading import parse_json, read_text
from ..core.recipe import parse
from ..formats import safe

NUMBERS = {"rate", "step_s", "seconds", "limit"}
COUNTS = {"trained", "promised", "peak", "updates", "batch"}


@dataclass
class Record:
    """One recipe on one task within one budget.

    ran: the recipe as it was sized for the budget. limit: of the budget, in its unit. scores: on
    test rows, of seeds 0, 1, ...; rate: the learning rate, tried: rate -> score on validation rows.
    updates: of the training; batch: samples at once (an update's are the task's). trained: numbers,
    with a new head's. promised, peak: bytes of a step, simulated and measured. step_s: processor
    seconds of an update. made: versions, machine. refused: why there is nothing of it.
    """

    recipe: str
    task: str
    budget: str
    ran: str = ""
    limit: float | None = None
    scores: list[float] = field(default_factory=list)
    rate: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    batch: int = 0
    trained: int = 0
    promised: int = 0
    peak: int = 0
    step_s: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    refused: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return said(self.recipe), self.task, self.budget

    @property
    def file(self) -> str:
        """A name for its document that says what it is of, and is its own."""
        recipe = said(self.recipe)
        name = re.sub(r"[^a-z0-9.]+", "-", recipe.lower()).strip("-")[:60]
        mark = hashlib.sha256(recipe.encode()).hexdigest()[:8]
        return f"{self.task}-{self.budget}-{name}-{mark}.json"

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in ("", [], {}, None)}

    @classmethod
    def of(cls, read: Any, where: str) -> Record:
        """A document that came from somewhere. Raises FormatError for what is none."""
        if not isinstance(read, dict):
            raise FormatError(f"{where}: a run is an object with recipe, task, budget and scores")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(read) - known):
            raise FormatError(f"{where}: a run has no {unknown[0]!r} (it has {', '.join(known)})")
        for key in ("recipe", "task", "budget"):
            if not isinstance(read.get(key), str) or not read[key]:
                raise FormatError(f"{where}: {key} is to be a text")
        for key in NUMBERS | COUNTS:
            value = read.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise FormatError(f"{where}: {key}={value!r} is to be a number, 0 or more")
        scores = read.get("scores", [])
        if not isinstance(scores, list) or not all(
                isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1
                for x in scores):
            raise FormatError(f"{where}: scores are to be a list of shares from 0 to 1")
        if not scores and not read.get("refused"):
            raise FormatError(f"{where}: neither scores nor why there are none (refused)")
        tried = read.get("tried", {})
        if not isinstance(tried, dict) or not all(
                isinstance(x, int | float) and not isinstance(x, bool) for x in tried.values()):
            raise FormatError(f"{where}: tried is to be an object of numbers")
        for key, kind in (("tried", dict), ("made", dict), ("date", str), ("ran", str),
                          ("refused", str)):
            if key in read and not isinstance(read[key], kind):
                raise FormatError(f"{where}: {key} is to be "
                                  f"{'an object' if kind is dict else 'a text'}")
        return cls(**read)


def said(recipe: str) -> str:
    """The recipe as it is always written; one of another version as it stands."""
    try:
        return str(parse(recipe))
    except RecipeError:
        return recipe


class Records:
    """The runs in a folder, or in files that are named."""

    def __init__(self, records: Iterable[Record] = ()):
        self.found: dict[tuple[str, str, str], Record] = {}
        for r in records:
            self.add(r)

    def add(self, record: Record) -> None:
        old = self.found.get(record.key)
        if old is None or old.date <= record.date:
            self.found[record.key] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(self.found.values())

    def __len__(self) -> int:
        return len(self.found)

    def get(self, recipe: str, task: str, budget: str) -> Record | None:
        """The run of a recipe, however it is written."""
        return self.found.get((said(recipe), task, budget))

    @classmethod
    def read(cls, path: str | Path) -> Records:
        """Of a folder (its .json and .jsonl) or a file; a folder that is not there yet is empty.
        Raises FormatError for what is no run, with file and line."""
        path = Path(path)
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) \
            if path.is_dir() else [path] if path.exists() else []
        out = cls()
        for file in files:
            text = read_text(file)
            lines = text.splitlines() if file.suffix == ".jsonl" else [text]
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}" if file.suffix == ".jsonl" else str(file)
                    out.add(Record.of(parse_json(line, where, finite=True), where))
        return out

    @staticmethod
    def write(folder: Path, record: Record) -> Path:
        """The document of a run."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be a folder of runs: {safe.reason(e)}") from None
        safe.write_json(folder / record.file, record.to_dict())
        return folder / record.file
