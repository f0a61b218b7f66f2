"""The order of rows: a function of seed and epoch, so that a run that goes on sees the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler

from ..core.errors import ConfigError
from .secret import Drawn, loader, secret_of

#: what transformers calls rows of like length beside each other
BY_LENGTH = "group_by_length"
#: updates that are sorted together, at most; and stretches that there are at least
UPDATES, STRETCHES = 50, 4


class Shuffled(Sampler[int]):
    """Each epoch a permutation drawn from (seed, epoch) alone: a resumed run sees the same rows.

    redrawn: rows know which pass they are asked for in (:class:`burnish.fit.rows.Rows`).
    """

    def __init__(self, size: int, seed: int, redrawn: bool = False):
        self.size, self.seed, self.epoch, self.redrawn = size, seed, 0, redrawn

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def order(self) -> list[int]:
        """This pass over the rows, as they are asked for."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=g)
        return (order + self.epoch * self.size if self.redrawn else order).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())


class Alike(Shuffled):
    """The same permutation, in which rows of like length stand together: it is cut into stretches
    of 50 updates (fewer, where that makes less than four), and each is sorted, the longest row
    first. Batches of a stretch hold rows of like length, whatever their size, so that processes
    and micro-batches share an update as they do without.

    rows: that know how long each is.  update: how many of them an update reads.
    """

    def __init__(self, rows: Any, seed: int, update: int):
        super().__init__(len(rows), seed, rows.redrawn)
        self.rows = rows
        self.stretch = update * max(1, min(UPDATES, len(rows) // (update * STRETCHES)))

    def order(self) -> list[int]:
        found = super().order()
        return [i for k in range(0, len(found), self.stretch)
                for i in sorted(found[k:k + self.stretch], key=self.rows.length, reverse=True)]


class Ordered:
    """A trainer whose rows come in an order of ours."""

    tuned: Any
    task: Any
    leg: Any
    args: Any
    accelerator: Any
    train_dataset: Any
    _rows: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == BY_LENGTH:
            return Alike(rows, self._seed, self._rows())
        return Shuffled(len(rows), self._seed, getattr(rows, "redrawn", False))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return SequentialSampler(eval_dataset)                     # figures may need the row

    @property
    def _seed(self) -> int:
        """Of the order of rows."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return int(seed + self.leg.number)

    def get_train_dataloader(self) -> Any:
        """Rows that are to be drawn each by itself come in batches of any size."""
        if self.tuned.sampling is None:
            return super().get_train_dataloader()                  # type: ignore[misc]
        rows: Any = self.train_dataset
        drawn = Drawn(self.tuned.sampling, self._seed, rows.redrawn)
        return self.accelerator.prepare(loader(rows, self.task.collate, drawn, self.args))


def by_length(task: str, asked: bool, recipe: Any) -> None:
    """Raises ConfigError where rows of like length were to stand together (`asked`) and the rows of
    the task have none, or a part of the recipe draws each by itself."""
    from .tasks import TASKS

    if not asked:
        return
    if not TASKS[task].unlike:
        having = ", ".join(name for name, kind in TASKS.items() if kind.unlike)
        raise ConfigError(f"group_by_length puts rows of like length together, and no batch of "
                          f"{task} is filled up to its longest row: leave it out; it is for "
                          f"{having}")
    if recipe is not None and (secret := secret_of(recipe)) is not None:
        raise ConfigError(f"group_by_length decides which rows stand together, and {secret} draws "
                          "each by itself: leave one out")
