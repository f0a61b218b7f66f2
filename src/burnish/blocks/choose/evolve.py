"""One option for each of several units, so that gains add up to the most within a budget.

An evolutionary search: children take each unit's option from one of two parents and change a few;
one that costs too much gives up options until it fits, then takes what room is left. The best stay.
The same seed finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

Choice = tuple[int, ...]


def evolve(gains: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int,
           seed: int = 0, population: int = 32, rounds: int = 100) -> Choice:
    """Per unit the number of an option. gains[i][j], costs[i][j]: of option j of unit i; option 0
    is none of them, at no gain and no cost."""
    draw, units = Random(seed), range(len(gains))

    def total(table: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
        return sum(table[i][j] for i, j in enumerate(choice))

    def fitted(choice: list[int]) -> Choice:
        """Within the budget, and nothing that still fits left out."""
        spent = sum(costs[i][j] for i, j in enumerate(choice))
        order = draw.sample(units, len(units))
        for i in order:
            if spent > budget:
                spent -= costs[i][choice[i]]
                choice[i] = 0
        for i in order:
            room = budget - spent + costs[i][choice[i]]
            best = max((j for j in range(len(gains[i])) if costs[i][j] <= room),
                       key=lambda j: (gains[i][j], -costs[i][j]))
            spent += costs[i][best] - costs[i][choice[i]]
            choice[i] = best
        return tuple(choice)

    def anyhow(i: int) -> int:
        return draw.randrange(len(gains[i]))

    living = {fitted([anyhow(i) for i in units]) for _ in range(population)}
    for _ in range(rounds):
        parents = sorted(living)
        for _ in range(population):
            a, b = draw.choice(parents), draw.choice(parents)
            child = [draw.choice((a[i], b[i])) for i in units]
            for i in units:
                if draw.random() * len(units) < 1:
                    child[i] = anyhow(i)
            living.add(fitted(child))
        living = set(sorted(living, key=lambda c: (-total(gains, c), total(costs, c), c))
                     [:population])
    return max(living, key=lambda c: (total(gains, c), -total(costs, c), [-j for j in c]))
