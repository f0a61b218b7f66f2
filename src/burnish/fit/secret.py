"""Runs whose updates say little of any one row: each is drawn by itself, and nothing else of the
run reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..core.batches import cut
from ..core.errors import ConfigError
from ..core.recipe import parse
from ..core.sampling import Sampling


class Drawn(Sampler[list[int]]):
    """Batches in which each row stands with the same chance, whatever stands beside it, so that
    their sizes differ and one may be empty. Drawn from (seed, epoch, number) alone."""

    def __init__(self, sampling: Sampling, seed: int, redrawn: bool = False):
        self.sampling, self.seed, self.epoch, self.redrawn = sampling, seed, 0, redrawn

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, round(self.sampling.rows / self.sampling.batch))

    def __iter__(self) -> Iterator[list[int]]:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for _ in range(len(self)):
            drawn = torch.rand(self.sampling.rows, generator=g, dtype=torch.float64)
            found = (drawn < self.sampling.rate).nonzero().flatten()
            yield (found + self.epoch * self.sampling.rows if self.redrawn else found).tolist()


def loader(rows: Any, collate: Any, drawn: Drawn, args: Any) -> DataLoader:
    """Batches as they are drawn; an empty one has the columns of the others."""
    def together(some: list[Any]) -> Any:
        return collate(some) if some else cut(collate([rows[0]]), 0)

    return DataLoader(rows, batch_sampler=drawn, collate_fn=together,
                      num_workers=args.dataloader_num_workers,
                      pin_memory=args.dataloader_pin_memory)


def secret_of(recipe: Any) -> str | None:
    """The part that lets an update say little of any one row, by name, or None."""
    return next((m.name for m in parse(recipe) if m.private), None)


def drawn_by(recipe: Any, rows: int, args: Mapping[str, Any]) -> Sampling | None:
    """How rows are drawn where a part counts on it, or None (they are shuffled). Raises ConfigError
    for what such a run cannot honour."""
    if (secret := secret_of(recipe)) is None:
        return None
    if float(args.get("max_grad_norm", 0.0)) > 0:
        raise ConfigError(f"max_grad_norm cuts what {secret} sums before it has added its noise; "
                          f"{secret} cuts each sample's gradient: leave it out")
    if int(args.get("gradient_accumulation_steps", 1)) > 1:
        raise ConfigError(f"{secret} makes a pass for each sample, so accumulation saves nothing: "
                          "give a larger batch_size instead")
    return Sampling(rows, int(args["per_device_train_batch_size"]))


def rows_read(batches: Iterator[Any], recipe: Any) -> Iterator[Any]:
    """What methods read before training, where they may."""
    if (secret := secret_of(recipe)) is not None:
        raise ConfigError(f"a part of the recipe reads training rows before it starts, and {secret}"
                          " lets nothing read them but its own sums; take another part, or "
                          "tune(..., calibration=rows that need no protection)")
    yield from batches
