"""What runs in one module while certain adapters are active: weights, and branches around it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from ..blocks.weight.provided import Weighted
from ..blocks.weight.term import Term, Wrap, asks_to_drop
from ..blocks.weight.within import Within
from ..core.call import current
from ..core.errors import RecipeError
from ..core.site import Place
from .layout import whole

if TYPE_CHECKING:
    from .weights import Weights

#: a place, the terms added there with their weights, and the functions of W
Group = tuple[Place, list[tuple[Term, float]], list[Wrap]]
#: ((place, its answer) of every weight, branches at the input, branches at the output): a branch
#: is its part, its module and its weight
Plan = tuple[list[Any], list[Any], list[Any]]


def make_plan(slot: Weights, module: nn.Module, active: Any) -> Plan:
    """What runs in this module.

    Raises RecipeError for functions of W that cannot be active so.
    """
    weights = dict(active)
    call = current()
    for name in weights if call is not None else ():
        if slot.state.gone.get(name, -1) > call.version:
            raise RecipeError(f"this forward ran with the adapter {name!r}, which has been "
                              "taken out since: its backward can no longer run")
    groups: dict[tuple, Group] = {}
    before, after = [], []
    for part in slot.parts:
        scale = weights.get(part.adapter, 0.0) * part.damp
        if not scale:
            continue
        made = slot.module_of(part)
        if part.branch is None and part.place is None:
            continue                                 # a listener: it wraps the run by itself
        if part.branch is not None:
            if part.branch.undoes and weights[part.adapter] != 1:
                raise RecipeError(f"{part.adapter!r} is undone by {part.key} in {slot.path}, which "
                                  f"undoes it whole; it can be used whole, not at {scale}")
            (before if part.branch.at == "input" else after).append((part, made, scale))
            continue
        place = part.place
        _, terms, wraps = groups.setdefault((place.param, place.rows), (place, [], []))
        if isinstance(made, Wrap):
            if scale != 1:
                raise RecipeError(f"{part.adapter!r} holds a function of W "
                                  f"({part.key}); it can be used whole, not at {scale}")
            wraps.append(made)
        else:
            terms.append((made, scale))
    ops = []
    for place, terms, wraps in _joined(slot, module, groups):
        if len(wraps) > 1:
            raise RecipeError(f"{place.name} has {len(wraps)} functions of W active at once; "
                              "only one may wrap the others' sum: use one adapter at a time")
        for t, _ in terms:
            t.reads_on(slot.grid(place.param))
        _undropped(place, terms, wraps)
        _heard(place, terms, wraps)
        base = functools.partial(slot._place_view, module, place)
        held = functools.partial(slot._held, module, place.param)
        coded = functools.partial(slot._coded, module, place)
        ops.append((place, Weighted(base, terms, wraps[0] if wraps else None, held,
                                    slot.state.room, coded)))
    return ops, _last_first(before), _last_first(after)


def _last_first(branches: list[Any]) -> list[Any]:
    """What undoes others is in reverse order, where it stands."""
    found = [b for b in branches if b[0].branch.undoes]
    return [found.pop() if b[0].branch.undoes else b for b in branches]


def _undropped(place: Place, terms: list[tuple[Term, float]], wraps: list[Wrap]) -> None:
    """RecipeError for dropout under a function of W that makes the whole weight: an update as a
    matrix has no place for it."""
    for wrap in wraps:
        if wrap.whole and any(asks_to_drop(t) for t, _ in terms):
            raise RecipeError(f"dropout on the input of {place.name} cannot act under a function "
                              f"of the whole weight ({type(wrap).__name__}); set dropout=0, or "
                              "give the parts different targets")


def _heard(place: Place, terms: list[tuple[Term, float]], wraps: list[Wrap]) -> None:
    """RecipeError for an update of a weight whose place another one takes."""
    if terms and (deaf := next((w for w in wraps if w.deaf), None)) is not None:
        first: Any = terms[0][0]
        raise RecipeError(f"{deaf.part} takes the place of {place.name}: what "
                          f"{getattr(first, 'part', 'another part')} adds to it would not be "
                          "heard; give them different targets")


def _joined(slot: Weights, module: nn.Module, groups: dict[tuple, Group]) -> list[Group]:
    """A weight that is tuned as a whole and by some of its rows has one answer: for the whole."""
    fused = {param for param, rows in groups if rows is None}
    if all(rows is None or param not in fused for param, rows in groups):
        return list(groups.values())
    out = {key: group for key, group in groups.items() if key[1] is None or key[0] not in fused}
    for (param, rows), (place, terms, wraps) in groups.items():
        if rows is None or param not in fused:
            continue
        top, there, _ = out[param, None]
        if wraps:
            raise RecipeError(f"{place.name} has a function of W, and {top.name}, whose rows they "
                              "are, an update of its own; a function of W stands over one weight "
                              "alone: give the parts the same targets")
        width = slot._place_view(module, whole(place)).shape[-2]
        there.extend((Within(t, rows, width), s) for t, s in terms)
    return list(out.values())
