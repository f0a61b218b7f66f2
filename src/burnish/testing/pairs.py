"""Which pairs of methods a run puts in one recipe: so many recipes, whatever the catalogue's size.

Every axis meets every axis in each run; methods that have changed meet every axis; what room is
left goes to the others in turn, as the seed says. ``BURNISH_ALL=1``: every pair in both orders.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

from ..core import registry
from ..core.axes import AXES
from ..core.errors import BurnishError
from ..core.recipe import parse
from . import changed
from .choose import everything, rank

#: recipes of one run
RECIPES = 120


def joinable(recipe: str) -> bool:
    """The parts may stand in one recipe (a model may still refuse it)."""
    try:
        parse(recipe)
    except BurnishError:
        return False
    return True


def by_axis(names: Sequence[str]) -> dict[str, list[str]]:
    """Axis -> the methods whose first answer it is."""
    found = {a: [n for n in names if registry.find(n).axes()[0] == a] for a in AXES}
    return {a: some for a, some in found.items() if some}


def pairs(names: Sequence[str], all: bool | None = None, seed: int | None = None,
          new: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Ordered pairs, the ones that matter most first: every axis beside every axis, changed methods
    beside every axis, then the others in turn; or every pair in both orders."""
    if everything() if all is None else all:
        return list(itertools.permutations(names, 2))
    seed = changed.seed() if seed is None else seed
    new = changed.methods() if new is None else new
    homes = by_axis(names)
    out: dict[tuple[str, str], None] = {}

    def meet(name: str, there: Sequence[str]) -> None:
        others = sorted((o for o in there if o != name), key=lambda o: rank(str(seed), name, o))
        for other in others[:1]:
            a, b = sorted((name, other), key=lambda n: rank(str(seed), n, name, other))
            if (b, a) not in out:
                out[a, b] = None

    for a, b in itertools.combinations_with_replacement(homes, 2):
        meet(min(homes[a], key=lambda n: rank(str(seed), a, b, n)), homes[b])
    turn = sorted(names, key=lambda n: (n not in new, rank(str(seed), n)))
    for name in turn:
        for there in homes.values():
            meet(name, there)
    return list(out)


def covering(wanted: Iterable[tuple[str, str]], text: dict[str, str], size: int = 4,
             rows: int | None = None) -> list[tuple[str, ...]]:
    """Rows of up to `size` parts such that every wanted pair stands in one of them, in its order;
    the first `rows` of them, where so many are asked for.

    Parts that cannot stand together make a row of two. text: name -> how it is written.
    """
    left = dict.fromkeys(wanted)
    after: dict[str, list[str]] = {}
    for a, b in left:
        after.setdefault(a, []).append(b)
    out: list[tuple[str, ...]] = []
    while left and (rows is None or len(out) < rows):
        a, b = next(iter(left))
        row = [a, b]
        if joinable(" + ".join(text[n] for n in row)):
            while len(row) < size:
                gain = {c: sum((x, c) in left for x in row)
                        for x in row for c in after.get(x, ()) if c not in row}
                for c in sorted(gain, key=lambda c: (-gain[c], rank(*row, c))):
                    if gain[c] and joinable(" + ".join(text[n] for n in (*row, c))):
                        row.append(c)
                        break
                else:
                    break
        for x, y in itertools.combinations(row, 2):
            left.pop((x, y), None)
        out.append(tuple(row))
    return out
