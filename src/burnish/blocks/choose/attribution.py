"""How much a change of a weight has to do with a change of the loss, by integrated gradients.

The weights go from theta_0 to theta_1 by a brief full tuning; on the straight line between them the
product of the way and the gradient adds up to what the loss lost, entry by entry.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .observe import Reads, Statistic, wide


class Contribution(Statistic):
    """``F_f = mean over points and samples of sum_k |(theta_1 - theta_0)_k dL/dtheta_k|``, k the
    entries of filter f (a row of the (out, in) weight): (out,) numbers."""

    reads: ClassVar[Reads] = "gradient"
    alone: ClassVar[bool] = True
    turns = "once"

    def __init__(self, out: int):
        self.out, self.count = out, 0
        self.way: Tensor = torch.zeros(())
        self.total: Tensor = torch.zeros(out)

    @property
    def nbytes(self) -> int:
        return 4 * self.out

    def leads(self, way: Tensor) -> None:
        self.way = way

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        g = wide(x)
        self.total = self.total.to(g) + (self.way.to(g) * g).abs().sum(1)
        self.count += 1

    @property
    def value(self) -> Tensor:
        return self.total / max(1, self.count)


def travelled(model: nn.Module, batches: Sequence[Any], loss: Callable[[Any], Tensor], steps: int,
              lr: float, points: int) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Tune all of `model` for `steps` updates of Adam (each while backward runs, so one gradient
    stands at a time; moments of all do), then put its weights at ``theta_0 + t / points (theta_1 -
    theta_0)``, t = 1 ... points, and yield there: parameter -> theta_1 - theta_0, on the host.
    However it ends, every bit of the weights is where it was."""
    trained = [p for n, p in model.named_parameters()
               if p.is_floating_point() and ".burnish." not in f".{n}"]
    start = [p.detach().to("cpu", copy=True) for p in trained]
    flags = [p.requires_grad for p in trained]
    try:
        _descend(trained, batches, loss, steps, lr)
        way = {p: wide(p.detach().cpu()) - wide(s) for p, s in zip(trained, start, strict=True)}
        for t in range(1, points + 1):
            with torch.no_grad():
                for p, s in zip(trained, start, strict=True):
                    p.copy_(wide(s) + way[p] * (t / points))
            yield way
    finally:
        with torch.no_grad():
            for p, s, flag in zip(trained, start, flags, strict=True):
                p.copy_(s)
                p.requires_grad_(flag)


def _descend(trained: Sequence[nn.Parameter], batches: Sequence[Any],
             loss: Callable[[Any], Tensor], steps: int, lr: float) -> None:
    rules = {p: torch.optim.Adam([p.requires_grad_(True)], lr=lr) for p in trained}

    def step(p: Tensor) -> None:
        rules[p].step()                                  # type: ignore[index]
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(step) for p in trained]
    try:
        with torch.enable_grad():
            for batch in itertools.islice(itertools.cycle(batches), steps):
                loss(batch).backward()
    finally:
        for h in hooks:
            h.remove()
        for p in trained:
            p.requires_grad_(False)


def ranks_to(budget: float, weights: Sequence[float], costs: Sequence[int], caps: Sequence[int]
             ) -> list[int]:
    """Whole ranks in proportion to `weights`, from 1 to their caps, for ``sum r_l costs_l <=
    budget``; what is left is less than a largest cost. Ranks of 1 alone may cost more.

    One after the other the rank that is next to be rounded up grows, at level ``(r + 1/2) / w``; of
    equal ones the first. The first that the budget has no room for ends it.
    """
    ranks, left = [1] * len(weights), budget - sum(costs)
    due = [(1.5 / w, i) for i, w in enumerate(weights) if w > 0 and caps[i] > 1]
    heapq.heapify(due)
    while due:
        _, i = heapq.heappop(due)
        if (left := left - costs[i]) < 0:
            break
        ranks[i] += 1
        if ranks[i] < caps[i]:
            heapq.heappush(due, ((ranks[i] + 0.5) / weights[i], i))
    return ranks
