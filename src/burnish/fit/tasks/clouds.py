"""Clouds of points with a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...core.errors import ConfigError
from ..clouds import Cloud, cloud, sampled
from ..from_files import KEEP_BYTES
from ..rows import Rows
from .base import Batch
from .classes import _Number, _Several, _Single
from .own import Own

#: points of a cloud where nobody says how many, as Point-MAE and PointNet take of ModelNet
POINTS = 1024


class Clouds(Rows):
    """``points`` (points, 3) and ``labels``. Rows that train are drawn anew in each pass, as far as
    a file has more points than are drawn, or a surface.

    Files that were read are kept, as many as KEEP_BYTES hold.
    """

    def __init__(self, rows: Any, count: int, seed: int, again: bool,
                 where: Callable[[int], str] | None):
        self.paths = [c["path"] for c in rows["cloud"][:]]
        self.labels = rows["label"][:]
        self.count, self.seed, self.redrawn = count, seed, again
        self.where = where or (lambda i: self.paths[i])
        self.kept: dict[int, Cloud] = {}
        self.room = KEEP_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Cloud:
        made = self.kept.get(i)
        if made is None:
            made = cloud(self.paths[i])
            if made.nbytes <= self.room:
                self.room -= made.nbytes
                self.kept[i] = made
        return made

    def row(self, i: int) -> dict[str, Any]:
        turn, i = divmod(i, len(self))
        x = sampled(self.read(i), self.count, (self.seed, turn, i), self.where(i))
        return {"points": torch.from_numpy(x), "labels": self.labels[i]}


class _Cloud(Own):
    """``points`` (B, P, 3), by the name of the model's first argument, and ``labels``."""

    takes = ("cloud",)
    settings = ("points",)
    word = "a cloud of points"
    reads_what = "clouds of points"
    entry = "points"

    @property
    def count(self) -> int:
        return int(self.how.get("points") or POINTS)

    def called_with(self, name: str, names: list[str]) -> None:
        if not names or names[0] == "labels":
            raise ConfigError(f"{name} takes no clouds: its forward has no argument for points")
        self.entry = names[0]

    def make(self, split: str) -> Rows:
        return Clouds(self.data.splits[split], self.count, self.seed, split == "train",
                      self.data.where.get(split))

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {self.entry: torch.stack([r["points"] for r in rows]),
                "labels": self.labels([r["labels"] for r in rows])}

    def encode(self, row: Mapping[str, Any]) -> Batch:
        path = row["cloud"]["path"] if isinstance(row["cloud"], Mapping) else row["cloud"]
        x = sampled(cloud(path), self.count, (self.seed, 0, 0), str(path))
        return self.agreed({self.entry: torch.from_numpy(x)[None]})

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        raise NotImplementedError


class CloudClassification(_Single, _Cloud):
    """Clouds, each of one class."""


class CloudMultiLabel(_Several, _Cloud):
    """Clouds, each of any number of classes."""


class CloudRegression(_Number, _Cloud):
    """Clouds with a number each."""
