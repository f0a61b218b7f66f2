"""Which linears get experts, and which rows of a fused one: for the methods of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...core.errors import RankError, RecipeError, TargetError

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.site import Place

#: runs of outputs of a fused linear, None for all of them
Rows = tuple[tuple[int, int], ...] | None


def linears(anatomy: Anatomy, method: Any, places: list[Place]
            ) -> Iterator[tuple[Place, Rows, int]]:
    """(a place, its runs of rows, its outputs) for every linear inside a block among `places`. One
    too small for the method's rank is left out when nobody asked for it, unless it is the largest.

    Raises TargetError for targets that are no such linears, RecipeError where there are none.
    """
    asked = anatomy.asked.of(method)[0]
    by_path: dict[str, list[Place]] = {}
    for place in places:
        if place.kind in method.kinds and place.block is not None:
            by_path.setdefault(place.path, []).append(place)
        elif asked is not None:
            where = "outside them" if place.block is None else f"of kind {place.kind}"
            raise TargetError(f"{method.name} has experts for linears inside blocks; {place.name} "
                              f"is {where}")
    if not by_path:
        raise RecipeError(f"{method.name}: none of the targets is a linear inside a block")
    largest = max(by_path, key=lambda p: min(by_path[p][0].out, by_path[p][0].inp))
    for path, places in by_path.items():
        first = places[0]
        try:
            first.check_rank(method.rank, method.name)
        except RankError:
            if asked is not None or path == largest:
                raise
            continue
        rows = tuple(sorted(p.rows for p in places if p.rows)) or None
        out = next(p.out for p in anatomy.places if p.path == path and not p.rows)
        if rows and rows[0][0] == 0 and sum(b - a for a, b in rows) == out:
            rows = None
        yield first, rows, out
