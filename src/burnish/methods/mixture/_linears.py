"""Which linears get something beside them, and which rows of a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...core.asked import too_small
from ...core.errors import RankError, RecipeError, TargetError

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.site import Place

#: runs of outputs of a fused linear, None for all of them
Rows = tuple[tuple[int, int], ...] | None


def linears(anatomy: Anatomy, method: Any, places: list[Place], *, anywhere: bool = False,
            samples: bool = False, rank: int | None = None) -> Iterator[tuple[Place, Rows, int]]:
    """(a place, its runs of rows, its outputs) for every linear inside a block (anywhere: any)
    among `places`. One too small for a rank, if there is one, is left out with a note when nobody
    asked for it, unless it is the largest. samples: those of routed experts are none, which are
    given the tokens of all samples together.

    Raises TargetError for targets that are no such linears, RecipeError where there are none.
    """
    where = "linears" if anywhere else "linears inside blocks"
    asked = anatomy.asked.of(method)[0]
    by_path: dict[str, list[Place]] = {}
    for place in places:
        inside, routed = anywhere or place.block is not None, samples and _routed(place)
        if place.kind in method.kinds and inside and not routed:
            by_path.setdefault(place.path, []).append(place)
        elif asked is not None:
            why = "outside them" if not inside else f"of kind {place.kind}" \
                if place.kind not in method.kinds else "given the tokens of all samples together"
            raise TargetError(f"{method.name} acts on {where}; {place.name} is {why}")
    if not by_path:
        raise RecipeError(f"{method.name}: none of the targets is one of the {where}")
    largest = max(by_path, key=lambda p: min(by_path[p][0].out, by_path[p][0].inp))
    small: list[Place] = []
    for path, places in by_path.items():
        first = places[0]
        try:
            first.check_rank(min(first.out, first.inp) if rank is None else rank, method.name)
        except RankError:
            if asked is not None or path == largest:
                raise
            small.append(first)
            continue
        rows = tuple(sorted(p.rows for p in places if p.rows)) or None
        out = next(p.out for p in anatomy.places if p.path == path and not p.rows)
        if rows and sum(b - a for a, b in rows) == out:
            rows = None
        yield first, rows, out
    anatomy.asked.notes += too_small(method, small, len(by_path))


def _routed(place: Place) -> bool:
    return ".experts." in f".{place.path}."
