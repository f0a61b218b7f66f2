"""A falling number of entries that generated updates compete for while they train (SNELLA).

Every so often each term is given its share of the budget, in proportion to its importance and never
more than it has; within a term the largest entries win by themselves (weight/tiled.py). A handler
of a run's events (core/events.py) over terms by name, which have ``out``, ``inp``, two factors A
and B, and a settable ``sparsity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .budget import allocate, cubic
from .ranks import Falling
from .score import Smoothed


class Sharing:
    """V(t) entries over all terms, shared out `rounds` times.

    falling: share of all entries that may live; it falls as a cubic and has arrived at the last
    turn at the latest. The turns come after k / (rounds + 1) of the run, k = 1 ... rounds, so that
    every share is trained. importance(theta, gradient): of the elements of a factor after each
    update (the new theta and the old gradient), smoothed as I' U; a term's score is
    ``mean(I' U)_A + mean(I' U)_B``. Without a known number of updates nothing falls.
    """

    def __init__(self, terms: Mapping[str, Any], falling: Falling, rounds: int,
                 importance: Callable[[Tensor, Tensor], Tensor]):
        self.terms, self.falling, self.rounds = dict(terms), falling, rounds
        self.importance = importance
        self.scores = {n: (Smoothed(), Smoothed()) for n in self.terms}
        self._of = {p: s for n, t in self.terms.items()
                    for p, s in zip((t.A, t.B), self.scores[n], strict=True)}
        self.start(None)

    def start(self, total: int | None) -> None:
        self.total, n = total, self.rounds + 1
        self.turns = frozenset(min(max(1, round(total * k / n)), max(1, total - 1))
                               for k in range(1, n)) if total else frozenset()

    def budget(self, step: int) -> int:
        """V(t) in entries."""
        size = sum(t.out * t.inp for t in self.terms.values())
        f, last, total = self.falling, max(self.turns), self.total or 0
        if step >= last:                             # there is no later turn to arrive at
            return round(f.end * size)
        return round(cubic(f.start * size, f.end * size, step, f.warmup * total,
                           min((1 - f.cooldown) * total, last)))

    def tensor_updated(self, p: nn.Parameter, grad: Tensor) -> None:
        if (smoothed := self._of.get(p)) is not None:
            smoothed.update(self.importance(p, grad))

    def after_update(self, step: int) -> None:
        if step + 1 in self.turns:
            self.reallocate(self.budget(step + 1))

    def reallocate(self, budget: int) -> None:
        """Give every term its share of `budget` entries."""
        if any(a.mean is None for a, _ in self.scores.values()):
            return
        scores = torch.stack([a.score().mean() + b.score().mean()
                              for a, b in self.scores.values()])
        if isinstance(scores, FakeTensor):           # a simulation: their order is unknown
            return
        sizes = [t.out * t.inp for t in self.terms.values()]
        for term, size, v in zip(self.terms.values(), sizes,
                                 allocate(budget, scores.tolist(), sizes), strict=True):
            term.sparsity = 1 - v / size

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total,
                "scores": {n: {"A": a.state(), "B": b.state()}
                           for n, (a, b) in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start(state["total"])
        for n, (a, b) in self.scores.items():
            a.load(state["scores"][n]["A"])
            b.load(state["scores"][n]["B"])
