"""Weights without their smallest entries, for a while: pruned ever further, then as they were.

A histogram of magnitudes over all weights (or of each) says where a share of them ends; entries are
taken out tensor by tensor, and only what was taken out is held, so that all of it comes back bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .prune import kept

#: bits of an fp32 magnitude that a bin leaves out: bins are 2^-12 of a magnitude wide
COARSE = 11
#: entries looked at together
PIECE = 1 << 22


class Pruned:
    """The smallest share of some weights is zero.

    weights: changed in place. together: one ranking of all; else each loses the same share. seed: a
    random ranking instead of magnitudes, the control. Masks are nested: :meth:`to` only goes
    further. A context, whose end puts everything back.
    """

    def __init__(self, weights: Sequence[Tensor], together: bool = True, seed: int | None = None):
        self.weights = [w.detach().view(-1) for w in weights]
        self.together, self.seed = together, seed
        self.taken: list[tuple[int, Tensor, Tensor]] = []
        self.edge = [0] * len(self.weights)          # bins below it are taken out
        self.total = sum(w.numel() for w in self.weights)

    def __enter__(self) -> Pruned:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def to(self, s: float) -> float:
        """Take out until a share `s` is zero; the share that is zero then: entries whose magnitudes
        share a bin go together."""
        every = range(len(self.weights))
        for group in ([list(every)] if self.together else [[i] for i in every]):
            edge = self._end(group, s)
            for i in group:
                self._take(i, edge)
        return sum(v.numel() for _, _, v in self.taken) / max(1, self.total)

    @property
    def size(self) -> float:
        """What is smaller is out; of one ranking of all."""
        return float(torch.tensor(self.edge[0] << COARSE, dtype=torch.int32).view(torch.float32))

    def restore(self) -> None:
        """Every entry as it was."""
        for i, index, values in self.taken:
            self.weights[i][index.long()] = values
        self.taken, self.edge = [], [0] * len(self.weights)

    def _end(self, group: list[int], s: float) -> int:
        """The first bin that stays, where the lowest bins with a share `s` of the group go."""
        below = torch.stack([self._counts(i) for i in group]).sum(0).cumsum(0)
        wanted = int(s * int(below[-1]))
        return int(torch.searchsorted(below, torch.tensor(wanted))) + 1 if wanted else 0

    def _take(self, i: int, edge: int) -> None:
        for start, key in self._bins(i):
            new = ((key >= self.edge[i]) & (key < edge)).nonzero().squeeze(1) + start
            if new.numel():
                small = torch.int32 if len(self.weights[i]) < 2**31 else torch.int64
                self.taken.append((i, new.to(small), self.weights[i][new].clone()))
                self.weights[i][new] = 0
        self.edge[i] = max(self.edge[i], edge)

    def _bins(self, i: int) -> Iterator[tuple[int, Tensor]]:
        """(first entry, bins of a piece). What was taken out is in the lowest by now."""
        flat = self.weights[i]
        g = None if self.seed is None else \
            torch.Generator(flat.device).manual_seed(self.seed + 7919 * i)
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE]
            score = piece.abs().float() if g is None else \
                torch.rand(piece.shape, generator=g, device=flat.device)
            yield start, score.view(torch.int32) >> COARSE

    def _counts(self, i: int) -> Tensor:
        counts = torch.zeros(1 << (31 - COARSE), dtype=torch.int64)
        for _, key in self._bins(i):
            counts += torch.bincount(key, minlength=len(counts)).cpu()
        return counts


class PrunedRuns:
    """Of every run of m inputs the smallest are zero, so that n stay.

    weights: (..., out, in) views, changed in place; m divides `in`. seed: a random order, the
    control. Masks are nested: :meth:`to` only goes further. A context, whose end puts all back.
    """

    def __init__(self, weights: Sequence[Tensor], m: int, seed: int | None = None):
        self.weights, self.m, self.seed = [w.detach() for w in weights], m, seed
        self.taken: list[tuple[int, Tensor, Tensor]] = []

    def __enter__(self) -> PrunedRuns:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def to(self, n: int) -> float:
        """Take out until n of m stay; the share that is out then."""
        for i, w in enumerate(self.weights):
            if self.seed is None:
                score = w.abs().float()
            else:
                g = torch.Generator(w.device).manual_seed(self.seed + 7919 * i)
                score = torch.rand(w.shape, generator=g, device=w.device)
            mask = (w != 0) & ~kept(score, f"{n}:{self.m}", 0.0)
            index = mask.nonzero()
            self.taken.append((i, index.to(torch.int32), w[mask]))
            w.masked_fill_(mask, 0)
        return 1 - n / self.m

    def restore(self) -> None:
        """Every entry as it was."""
        for i, index, values in self.taken:
            self.weights[i][index.long().unbind(1)] = values
        self.taken = []
