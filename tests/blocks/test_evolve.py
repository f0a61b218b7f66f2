"""The search for one option per unit, against all there are."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from burnish.blocks.choose.evolve import evolve


def best_of_all(gains, costs, budget):
    every = itertools.product(*(range(len(g)) for g in gains))
    fits = [c for c in every if sum(costs[i][j] for i, j in enumerate(c)) <= budget]
    return max(sum(gains[i][j] for i, j in enumerate(c)) for c in fits)


def drawn(seed, units=6):
    draw = Random(seed)
    costs = [[0, *sorted(draw.randrange(1, 50) for _ in range(4))] for _ in range(units)]
    gains = [[0.0, *(draw.random() for _ in range(4))] for _ in range(units)]
    return gains, costs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [0, 37, 90, 10_000])
def test_it_finds_the_best_there_is_within_the_budget(seed, budget):
    gains, costs = drawn(seed)
    found = evolve(gains, costs, budget)
    assert sum(costs[i][j] for i, j in enumerate(found)) <= budget
    got = sum(gains[i][j] for i, j in enumerate(found))
    assert got == pytest.approx(best_of_all(gains, costs, budget))


@pytest.mark.parametrize("seed", range(6))
def test_two_that_live_find_it_by_what_changes_in_their_children(seed):
    gains, costs = drawn(seed)
    found = evolve(gains, costs, 90, seed, population=2, rounds=300)
    assert sum(gains[i][j] for i, j in enumerate(found)) == \
        pytest.approx(best_of_all(gains, costs, 90))
    alone = evolve(gains, costs, 90, seed, population=1, rounds=3000)
    assert sum(gains[i][j] for i, j in enumerate(alone)) == \
        pytest.approx(best_of_all(gains, costs, 90), rel=0.05)
    assert evolve([[0.0, 1.0]], [[0, 5]], 5, seed, population=1, rounds=0) == (1,)
    assert evolve([[0.0, 1.0]], [[0, 5]], 4, seed, population=1, rounds=0) == (0,)


def test_many_units_come_near_what_a_linear_relaxation_allows():
    """60 units: no more than 3 % below the bound of the concave hulls, filled by density."""
    draw = Random(3)
    costs = [[0, 10 * w, 20 * w, 40 * w] for w in (draw.randrange(1, 9) for _ in range(60))]
    gains = [[0.0, g, 1.8 * g, 3.0 * g] for g in (draw.random() for _ in range(60))]
    budget = sum(c[-1] for c in costs) // 4
    steps = sorted(((g[j] - g[j - 1]) / (c[j] - c[j - 1]), c[j] - c[j - 1])
                   for g, c in zip(gains, costs, strict=True) for j in (1, 2, 3))
    bound, left = 0.0, budget
    for density, cost in reversed(steps):
        bound += density * min(cost, left)
        left -= min(cost, left)
    found = evolve(gains, costs, budget)
    assert sum(costs[i][j] for i, j in enumerate(found)) <= budget
    assert sum(gains[i][j] for i, j in enumerate(found)) >= 0.97 * bound


def test_the_seed_says_all_and_ties_go_to_what_costs_less():
    gains, costs = drawn(1, units=40)
    for seed in (0, 7):
        assert evolve(gains, costs, 300, seed) == evolve(gains, costs, 300, seed)
    assert evolve(gains, costs, 300, 0, 1, 0) != evolve(gains, costs, 300, 1, 1, 0)
    assert evolve([[0.0, 0.0], [0.0, 1.0, 1.0]], [[0, 3], [0, 5, 2]], 100) == (0, 2)
    assert evolve([[0.0, 1.0]] * 2, [[0, 3], [0, 2]], 3) == (0, 1)
    assert evolve([[0.0, 1.0]] * 2, [[0, 2], [0, 3]], 3) == (1, 0)
    assert evolve([[0.0, 1.0]] * 2, [[0, 2], [0, 2]], 3) == (0, 1)
    assert evolve([], [], 10) == () and evolve([[0.0]], [[0]], 10) == (0,)
    assert evolve([[0.0, -1.0]], [[0, 1]], 10) == (0,)
