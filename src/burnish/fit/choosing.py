"""A finished run as a warm-up: its checkpoints as points of LESS, rows one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.batches import moved
from ..core.errors import ConfigError
from ..formats import safe
from ..formats.folder import read_adapter
from . import checkpoint
from .finished import Finished
from .state import load_tree

if TYPE_CHECKING:
    from torch import Tensor

    from ..methods.lifecycle.less import Less, Point


@dataclass
class Chooser:
    """points: the run's checkpoints, oldest first."""

    run: Finished
    points: list[Point]
    _rows: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path, base: str | None = None) -> Chooser:
        """Raises ConfigError for a run that has no checkpoints."""
        found = checkpoint.all_in(folder)
        run = Finished.open(folder, base)
        if not found:
            raise ConfigError(f"{folder} has no checkpoints, and rows are scored at them: run the "
                              "warm-up with --save-strategy epoch --save-total-limit 4")
        starts = [0, *map(checkpoint.step_of, found)]
        return cls(run, [_point(run, f, a) for f, a in zip(found, starts, strict=False)])

    def scores(self, method: Less, data: str, like: Sequence[str], split: str,
               say: Callable[[str], None] = lambda line: None) -> Tensor:
        """Of every row of `data`; see :class:`~burnish.methods.lifecycle.less.Less`."""
        if self.run.task.own_loss:
            raise ConfigError(f"a row of {self.run.task.data.task} has no loss of its own, so "
                              "there is no gradient to choose it by")
        wanted = {name: self._read(name, None)[0] for name in dict.fromkeys(like)}
        if len(wanted) < len(like):
            raise ConfigError("--like names the same file twice")
        self._rows, self._source = self._read(data, split)
        return method.lifecycle(
            self.run.tuned, self.points, _Again(self, self._rows),
            {n: _Again(self, rows) for n, rows in wanted.items()}, say=say)

    def _read(self, data: str, split: str | None) -> tuple[Any, Any]:
        rows, name, _ = self.run.chosen(data, split, {})
        source = self.run.task.data.splits[name]
        if not len(rows):
            raise ConfigError(f"{data} has no rows")
        return rows, source

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
        lines = []
        for i in numbers:
            row = self._row(i)
            try:
                lines.append(json.dumps(row, ensure_ascii=False))
            except TypeError:
                odd = next(k for k, v in row.items() if not isinstance(
                    v, str | int | float | list | Mapping | None))
                raise ConfigError(f"column {odd!r} is no text or number, so the rows cannot be "
                                  "written as JSON: take the numbers of --json") from None
        safe.write_text(path, "".join(f"{line}\n" for line in lines))

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
