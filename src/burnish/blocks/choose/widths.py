"""One of several widths for each layer: configurations whose mean is where it is wanted.

Drawn layer by layer alike, the mean of many layers is always near the middle of what there is (the
central limit), and small or large budgets are never seen. So the mean is drawn first, evenly over
all there is, and layers then by ``p_b ~ exp(lambda b)`` with lambda such that b is so on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from .genes import Genes

#: how near the mean of a configuration is to the one that is wanted, in bits
NEAR = 0.05
#: draws of which the nearest is taken where none is so near
TRIES = 64


def swept(low: float, high: float, step: int, every: int, draw: Random) -> float:
    """The mean that is wanted at a step: down from high to low and up again in `every` steps, each
    in its share of the way, anywhere in it; over a sweep all means come alike."""
    return low + (high - low) * abs(1 - 2 * (step % every + draw.random()) / every)


def tilted(widths: Sequence[int], mean: float) -> list[float]:
    """p over the widths, p_b ~ exp(lambda b), with that mean; ends: the width itself."""
    def at(slope: float) -> list[float]:
        top = max(slope * b for b in widths)
        p = [math.exp(slope * b - top) for b in widths]
        return [v / sum(p) for v in p]

    low, high = -64.0, 64.0
    for _ in range(60):
        slope = (low + high) / 2
        if sum(b * v for b, v in zip(widths, at(slope), strict=True)) < mean:
            low = slope
        else:
            high = slope
    return at((low + high) / 2)


def mean_of(genes: Sequence[int], sizes: Sequence[int]) -> float:
    """Mean bits of a weight, of layers with so many weights."""
    return sum(b * n for b, n in zip(genes, sizes, strict=True)) / sum(sizes)


def drawn(widths: Sequence[int], sizes: Sequence[int], mean: float, draw: Random) -> Genes:
    """A width for each layer, so that the mean of a weight is within NEAR of `mean`; where TRIES
    draws find none, the nearest of these."""
    p, best = tilted(widths, mean), ()
    off = math.inf
    for _ in range(TRIES):
        genes = tuple(draw.choices(widths, p, k=len(sizes)))
        if (now := abs(mean_of(genes, sizes) - mean)) < off:
            best, off = genes, now
        if off <= NEAR:
            break
    return best


def within(genes: Genes, space: Sequence[Sequence[int]], sizes: Sequence[int], budget: float,
           draw: Random) -> Genes:
    """The same within a budget of mean bits: layers at random, each to the next lower of its
    widths (ascending), until it is met or nothing is left to lower."""
    held = list(genes)
    spent, room = sum(b * n for b, n in zip(held, sizes, strict=True)), budget * sum(sizes)
    while spent > room and (high := [i for i, b in enumerate(held) if b > space[i][0]]):
        i = draw.choice(high)
        lower = space[i][space[i].index(held[i]) - 1]
        spent -= (held[i] - lower) * sizes[i]
        held[i] = lower
    return tuple(held)
