"""A finished run as a warm-up: its checkpoints as points of LESS, rows one by one, for whatever
chooses among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.batches import moved
from ..core.errors import ConfigError, FormatError
from ..formats import safe
from ..formats.folder import read_adapter
from . import checkpoint
from .finished import Finished
from .state import load_tree

if TYPE_CHECKING:
    from torch import Tensor

    from ..methods.lifecycle.less import Point


@dataclass
class Chooser:
    """points: the run's checkpoints, oldest first.  numbers: after :meth:`scores`, the row of the
    data that each score is of."""

    run: Finished
    points: list[Point]
    numbers: list[int] = field(default_factory=list)
    _source: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path, base: str | None = None) -> Chooser:
        """Raises FormatError for a run some of whose checkpoints are not what was written."""
        for one in checkpoint.named(folder):
            if bad := checkpoint.changed(one) or (not checkpoint.whole(one) and checkpoint.SEAL):
                raise FormatError(f"{one / bad} is not what the run wrote; remove {one.name} to "
                                  "choose rows without that point")
        found = checkpoint.all_in(folder)
        run = Finished.open(folder, base)
        starts = [0, *map(checkpoint.step_of, found)]
        return cls(run, [_point(run, f, a) for f, a in zip(found, starts, strict=False)])

    def scores(self, method: Any, data: str, like: Sequence[str], split: str,
               say: Callable[[str], None] = lambda line: None, written: bool = False) -> Tensor:
        """Of the rows of `data` (see `numbers`), as a method that chooses (less, goracs) has them;
        of a row that the task reads in several pieces the best piece's. Documents, which a
        training runs end to end, are scored one by one, by what max_length takes of each.

        written: ConfigError, before anything is scored, for rows that :meth:`write` could not, and
        for a method that reads checkpoints where the run has none."""
        if method.at_points and not self.points:
            raise ConfigError(f"{self.run.folder} has no checkpoints, and rows are scored at them: "
                              "run the warm-up with --save-strategy epoch --save-total-limit 4")
        if self.run.task.own_loss:
            raise ConfigError(f"a row of {self.run.task.data.task} has no loss of its own, so "
                              "there is no gradient to choose it by")
        if len({Path(name).resolve() for name in like}) < len(like):
            raise ConfigError("--like names the same file twice")
        wanted = {name: self._read(name, None)[0] for name in like}
        rows, self._source = self._read(data, split)
        for note in self.run.task.notes:
            say(note)
        sources = [rows.source(i) for i in range(len(rows))]
        if written:
            self._line(sources[0])
        found = method.lifecycle(self.run.tuned, self.points, _Again(self, rows),
                                 {n: _Again(self, rows) for n, rows in wanted.items()}, say=say)
        best: dict[int, float] = {}
        for i, score in zip(sources, found.tolist(), strict=True):
            best[i] = max(score, best.get(i, score))
        self.numbers = list(best)
        return found.new_tensor([best[i] for i in self.numbers])

    def _read(self, data: str, split: str | None) -> tuple[Any, Any]:
        _, name, _ = self.run.chosen(data, split, {})
        source = self.run.task.data.splits[name]
        if not len(source):
            raise ConfigError(f"{data} has no rows")
        return self.run.task.singly(name), source

    def batches(self, rows: Any) -> Iterator[Any]:
        """One row each, on the model's device."""
        device = next(self.run.tuned.model.parameters()).device
        for i in range(len(rows)):
            yield self.run.task.call(moved(self.run.task.collate([rows[i]]), device), False)[0]

    # -- what was chosen -------------------------------------------------------------------------
    def rows(self, numbers: Sequence[int]) -> Iterator[str]:
        """In a line each, for people."""
        for i in numbers:
            text = "  ".join(f"{k}={v}" for k, v in self._row(i).items())
            yield text if len(text) <= 90 else f"{text[:88]}.."

    def write(self, path: Path, numbers: Sequence[int]) -> None:
        """The chosen rows as lines of JSON, in the columns that ``burnish fit`` reads."""
        safe.write_text(path, "".join(f"{self._line(i)}\n" for i in numbers))

    def _line(self, i: int) -> str:
        row = self._row(i)
        for key, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ConfigError(f"column {key!r} is no text or number, so the rows cannot be "
                                  "written as JSON: take the numbers of --json") from None
        return json.dumps(row, ensure_ascii=False)

    def _row(self, i: int) -> dict[str, Any]:
        row, labels = dict(self._source[i]), self.run.task.data.labels
        if labels:
            for key in ("label", "tags"):
                if key in row:
                    found = row[key]
                    row[key] = [labels[v] for v in found] if isinstance(found, list) else \
                        labels[found] if isinstance(found, int) else found
        return row


@dataclass
class _Again:
    """Batches that can be gone through more than once."""

    chooser: Chooser
    rows: Any

    def __iter__(self) -> Iterator[Any]:
        return self.chooser.batches(self.rows)


def _point(run: Finished, folder: Path, start: int) -> Point:
    """A checkpoint; its rate is the mean over the updates since the one before, at `start`."""
    from ..methods.lifecycle.less import Point

    history = safe.read_json(folder / "trainer_state.json").get("log_history", [])
    rates = [h["learning_rate"] for h in history
             if "learning_rate" in h and start < h.get("step", 0) <= checkpoint.step_of(folder)]
    kept = load_tree(folder, "optimizer")
    group = kept["groups"][0] if kept.get("groups") else {}

    def read() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        _, tensors = read_adapter(folder)
        return tensors, load_tree(folder, "optimizer")["state"]

    rate = sum(rates) / len(rates) if rates else float(group.get("lr", 0.0))
    betas = group.get("betas") or (0.9, 0.999)
    return Point(rate, read, (float(betas[0]), float(betas[1])), float(group.get("eps", 1e-8)))
