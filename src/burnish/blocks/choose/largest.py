"""The largest entries over many matrices, of which no two need stand at once.

A statistic that `condenses` is gathered in rounds (engine/observe.py); once its round is over only
candidates are kept of it: position and score of entries that may still be among the chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from .observe import SquaredGradient


class Largest(SquaredGradient):
    """Mean over samples of (dL/dW)^2, of which the largest are kept.

    scores: those kept, falling.  index: their flat positions, equal scores in the matrix' order.
    """

    condenses: ClassVar[bool] = True

    def __init__(self, out: int, inp: int):
        super().__init__(out, inp)
        self.scores = torch.zeros(0)
        self.index = torch.zeros(0, dtype=torch.int64)

    def condense(self, most: int) -> None:
        """Keep so many, and let the rest go; nothing where nothing was read since."""
        if self.total.dim():
            flat = self.value.flatten()
            found = flat.topk(min(most, flat.numel())).indices.sort().values
            order = flat[found].argsort(descending=True, stable=True)
            self.index, self.total = found[order], torch.zeros(())
            self.scores = flat[self.index]

    def keep(self, n: int) -> None:
        self.scores, self.index = self.scores[:n].clone(), self.index[:n].clone()


class LargestOfBatches(Largest):
    """The same of whole batches: the square of a batch's gradient."""

    alone: ClassVar[bool] = False


def keep_largest(stats: Sequence[Largest], k: int) -> list[int]:
    """Cut all to the k largest they have together; how many each keeps. Of equal scores the
    earlier statistic's stay."""
    for s in stats:
        s.condense(k)
    sizes = [len(s.scores) for s in stats]
    order = torch.cat([s.scores for s in stats]).argsort(descending=True, stable=True)[:k]
    of = torch.repeat_interleave(torch.arange(len(stats)), torch.tensor(sizes))
    kept = torch.bincount(of[order], minlength=len(stats)).tolist()
    for s, n in zip(stats, kept, strict=True):
        s.keep(n)
    return kept
