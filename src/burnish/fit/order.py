"""The order of rows: a function of seed and epoch, so that a run that goes on sees the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Classed(Shuffled):
    """The same permutation, in which rows of a class stand together: each batch takes `per_class`
    of one class after another, in the order of the permutation, until it is full.

    The classes of a batch are drawn without one standing twice, each with a chance that goes by
    its rows that are left; where all have had their turn, anew. So every row still stands once in
    an epoch, and what is left of a class beyond whole shares stands in fewer.

    classes: of each row.  batch: rows that are compared with each other.
    """

    def __init__(self, classes: Sequence[int], seed: int, per_class: int, batch: int,
                 redrawn: bool = False):
        super().__init__(len(classes), seed, redrawn)
        self.classes, self.per_class, self.batch = list(classes), per_class, batch

    def order(self) -> list[int]:
        left: dict[int, list[int]] = {}
        for i in super().order():
            left.setdefault(self.classes[i % self.size], []).append(i)
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        queues = list(left.values())
        rest = torch.tensor([float(len(q)) for q in queues])
        out: list[int] = []
        while len(out) < self.size:
            space = min(self.batch, self.size - len(out))
            while space:
                many = min(-(-space // self.per_class), int((rest > 0).sum()))
                for k in torch.multinomial(rest, many, generator=g).tolist():
                    there = len(queues[k])
                    take = min(self.per_class, there, space)
                    take -= there - take == 1 and take > 2         # one alone has nobody near it
                    out += queues[k][:take]
                    queues[k], space = queues[k][take:], space - take
                    rest[k] = there - take
        return out


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
        if self.task.by_class:
            size = self.args.train_batch_size
            return Classed(self.task.classes(rows), self._seed,
                           by_class(self.task.how.get("per_class"), size), size, rows.redrawn)
        if self.args.train_sampling_strategy == BY_LENGTH:
            return Alike(rows, self._seed, self._rows())
        return Shuffled(len(rows), self._seed, getattr(rows, "redrawn", False))

    @property
    def _order(self) -> str:
        """What it is that a run which goes on must share."""
        if not self.task.by_class:
            return str(self.args.train_sampling_strategy)
        size = self.args.train_batch_size
        return f"{by_class(self.task.how.get('per_class'), size)} of a class in {size}"

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


def by_class(asked: int | None, batch: int) -> int:
    """How many rows of a class stand together in a batch. Raises ConfigError where it cannot hold
    two of two classes, or as many as were asked for."""
    if batch < 4:
        raise ConfigError(f"batch_size={batch} cannot hold two rows of a class and two of another, "
                          "which are compared; give 4 or more")
    found = min(4, batch // 2) if asked is None else asked
    if 2 * found > batch:
        raise ConfigError(f"per_class={found} leaves room for one class in batch_size={batch}, and "
                          f"nothing is told apart; give per_class={batch // 2} or less, or a "
                          "larger batch")
    return found


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
