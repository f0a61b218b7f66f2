from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...blocks.state.reservoir import Reservoir
from ...core.errors import ConfigError
from ...core.method import setting
from ..learner import Stored, Study, count
from ..streams import Row
from ..training import Given, cross_entropy
from .sequential import Sequential


@dataclass
class Replay(Sequential):
    """A task after the other beside a memory of the past: as many rows of it as new ones a step.

        loss = (CE(new rows) + CE(rows of the memory)) / 2

    The memory is a reservoir over every row seen, each as likely to be there as another; rows of a
    task are shown to it once the task is learnt. With `cap` a task trains on so many of its rows
    at most, new and old, so that a task costs the same however many came before: static ConPET.
    A recipe that reads ``replay`` (i_lora) is told which rows are of the memory.
    """

    paper: ClassVar[str] = ("On Tiny Episodic Memories in Continual Learning (2019), "
                            "arXiv:1902.10486; ConPET (2023), arXiv:2309.14763, its static form")

    memory: int = setting(100, "rows of the past that are kept")
    cap: int | None = setting(None, "rows of a task that are trained on; None: all")

    def __post_init__(self) -> None:
        if self.memory < 1 or self.cap is not None and self.cap < 1:
            raise ConfigError(f"replay: a memory and a cap of at least 1 row are expected, got "
                              f"{self.memory} and {self.cap}")

    def begin(self, study: Study) -> None:
        super().begin(study)
        self.kept = Kept(self.memory, study.seed)
        self.used: list[int] = []                    # rows of each task that were trained on

    def rows(self, t: int) -> Sequence[Row]:
        rows = self.study.stream.tasks[t].train
        if self.cap is None or len(rows) <= self.cap:
            return rows
        draw = torch.Generator().manual_seed(7919 * self.study.seed + t)
        return [rows[i] for i in torch.randperm(len(rows), generator=draw)[:self.cap].tolist()]

    def given(self, rows: list[Row], t: int, replayed: int = 0) -> Given:
        old = self.kept.draw(len(rows))
        return super().given([*rows, *old], t, len(old))

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        return halves(z, given, self.allowed(given, t))

    def learn(self, t: int) -> None:
        super().learn(t)
        rows = self.rows(t)
        self.used.append(len(rows))
        self.kept.show(rows)

    def stored(self) -> Stored:
        return count(self.held().values(), [x for x, _ in self.kept.held()])


class Kept:
    """Rows of the past, by a reservoir of their numbers."""

    def __init__(self, size: int, seed: int):
        self.reservoir, self.shown = Reservoir(size, seed), 0
        self._rows: dict[int, Row] = {}

    def show(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        numbers = range(self.shown, self.shown + len(rows))
        self._rows.update(zip(numbers, rows, strict=True))
        self.reservoir.show({"row": torch.tensor(numbers)})
        self.shown += len(rows)
        stay = self.reservoir.state_dict()["held"]["row"][:len(self.reservoir)].tolist()
        self._rows = {i: self._rows[i] for i in stay}

    def draw(self, n: int) -> list[Row]:
        """n rows, none twice; all there are where there are fewer."""
        return [self._rows[i] for i in self.reservoir.draw(n)["row"].tolist()] \
            if self._rows else []

    def held(self) -> list[Row]:
        return list(self._rows.values())


def halves(z: Tensor, given: Given, allowed: Tensor) -> Tensor:
    """Half the mean over new rows and half that over rows of the past; the former alone where there
    are none."""
    old = given.keys["replay"].bool()
    allowed = allowed.to(z.device).expand(len(z), -1)
    new = cross_entropy(z[~old], given.labels[~old], allowed[~old])
    return new if not old.any() else \
        (new + cross_entropy(z[old], given.labels[old], allowed[old])) / 2
