"""A genetic search over lists of values, and what an encoder of chosen sizes weighs and takes.

A genome is one value of each list. Children come of two parents by one cut, or of one by drawing
all genes behind a random place anew; one that has been there is drawn anew; the best stay. The same
seed finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, product
from random import Random
from typing import NamedTuple

Genes = tuple[int, ...]
#: operations of a number that passes: a dropout, a norm, an activation, a softmax
DROPOUT, NORM, ACT, SOFTMAX = 4, 5, 8, 5


def genetic(space: Sequence[Sequence[int]], fitness: Callable[[Genes], float], *,
            population: int = 50, rounds: int = 100, crossover: float = 0.6, seed: int = 0,
            mend: Callable[[Genes, Random], Genes] | None = None) -> Genes:
    """The fittest that was met; of equals the smallest.

    mend: makes of any genome one that is allowed; only such are then looked at. Where a hundred
    others are known too, no new one is looked for.
    """
    draw, size = Random(seed), math.prod(map(len, space))
    known: dict[Genes, float] = {}

    def mutated(genes: Genes) -> Genes:
        at = draw.randrange(len(space))
        return (*genes[:at], *(draw.choice(values) for values in space[at:]))

    def fresh(genes: Genes) -> None:
        """Join those that are known, drawn anew as long as it is one of them."""
        tries = 0
        while True:
            genes = genes if mend is None else mend(genes, draw)
            if genes not in known:
                known[genes] = fitness(genes)
                return
            tries += 1
            if len(known) == size or mend is not None and tries > 100:
                return
            genes = mutated(genes)

    def best() -> list[Genes]:
        return sorted(known, key=lambda g: (-known[g], g))[:population]

    for _ in range(population):
        fresh(tuple(draw.choice(values) for values in space))
    for _ in range(rounds):
        living = best()
        for _ in range(population):
            a, b = draw.choice(living), draw.choice(living)
            at = draw.randrange(1, len(space)) if len(space) > 1 else 0
            fresh((*a[:at], *b[at:]) if draw.random() < crossover else mutated(a))
    return best()[0]


def climbed(space: Sequence[Sequence[int]], fitness: Callable[[Genes], float], genes: Genes
            ) -> Genes:
    """From there on, as long as another value of one gene, or of two, is fitter: the fittest."""
    here = fitness(genes)
    pairs = list(combinations(range(len(space)), min(2, len(space))))
    left = len(pairs)
    while left:
        at = pairs.pop(0)
        pairs.append(at)
        found = [list(genes) for _ in range(math.prod(len(space[i]) for i in at))]
        for other, values in zip(found, product(*(space[i] for i in at)), strict=True):
            for i, v in zip(at, values, strict=True):
                other[i] = v
        best = max(map(tuple, found), key=fitness)
        left -= 1
        if fitness(best) > here:
            genes, here, left = best, fitness(best), len(pairs)
    return genes


class Sizes(NamedTuple):
    """Of an encoder like RoBERTa that classifies."""

    vocabulary: int
    heads: int
    hidden: int
    inner: int
    layers: int

    def parameters(self, classes: int = 2, positions: int = 514) -> int:
        """Tables, their norm, blocks, a head of two linears."""
        v, _, h, m, layers = self
        block = 4 * (h * h + h) + 2 * h * m + m + h + 4 * h
        return (v + positions + 1 + 2) * h + layers * block + h * h + h + classes * (h + 1)

    def operations(self, tokens: int, classes: int = 2, literal: bool = False) -> int:
        """Of one forward over so many tokens: two for a product, one for a sum.

        literal: as published, where the table is a product with one-hot vectors (2 v h a token) and
        the norm behind attention counts as that of one number.
        """
        v, heads, h, m, layers = self
        attention = (3 * (2 * h * h + h) + 2 * h * tokens                     # q, k, v; scores
                     + (SOFTMAX + DROPOUT + 1) * tokens * heads + 2 * h * tokens
                     + 2 * h * h + h + DROPOUT * h + h + NORM * (1 if literal else h))
        mlp = 2 * h * m + (ACT + 1) * m + 2 * h * m + h + DROPOUT * h + h + NORM * h
        table = 2 * h + NORM * h + DROPOUT * h + (2 * v * h if literal else 0)
        head = 2 * h * h + h + (ACT + DROPOUT) * h + classes * (2 * h + 1)
        return tokens * (layers * (attention + mlp) + table) + head
