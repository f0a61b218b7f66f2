"""Every setting acts: another legal value of it gives another run.

What cannot be told from a setting's type stands beside it, in the method's file: ``other`` values,
what it is shown ``beside``, why it is ``unseen`` (core/method.py, :func:`setting`).
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import Field, fields
from typing import Any

import torch

from ...core.errors import BurnishError
from ...core.method import Method
from ...core.recipe import make
from ...engine.tune import tune
from .. import choose
from .common import Skip, data, fresh, method_of, part, recipe, split
from .training import differ


def own(name: str) -> list[Field[Any]]:
    """The settings that are a method's own (not `targets`, which all have)."""
    common = {f.name for f in fields(Method)}
    return [f for f in fields(method_of(name)) if f.name not in common]


def every_setting_acts(name: str, model: str, only: Collection[str] | None = None) -> Skip | None:
    """Another value of each setting (of those in `only`) gives another run, or is refused with a
    reason, on this model or on another that the method is shown on; one that is called `unseen`
    gives none."""
    mine = [f for f in own(name) if only is None or f.name in only]
    said = [why for f in mine if (why := at_fault(name, f, model)) is not None]
    assert not said, "; ".join(said)
    return None if mine else Skip("has no settings")


def at_fault(name: str, f: Field[Any], model: str) -> str | None:
    """What is wrong with a setting, or None."""
    acts = shows(name, f, model)
    if unseen := f.metadata.get("unseen", ""):
        return f"{f.name} acts, although it is called unseen ({unseen}): take that away" \
            if acts else None
    more = (m for m in choose.models_for(name, all=False) if m != model)
    if acts or any(shows(name, f, m) for m in more):
        return None
    return f"{f.name} does the same whatever is given for it" if acts is False else \
        f"{f.name}: no other value was accepted; name one with setting(..., other=(...))"


def shows(name: str, f: Field[Any], model: str) -> bool | None:
    """Does another value give another run on a model? None: no other value is legal there."""
    beside = dict(f.metadata.get("beside", {}))
    tried: bool | None = None
    for value in others(name, f):
        try:
            if differ(model, recipe(name, **beside), recipe(name, **{**beside, f.name: value})):
                return True
        except BurnishError:
            continue
        tried = False
    return tried


def others(name: str, f: Field[Any]) -> Iterator[Any]:
    """Values unlike the one the small recipe has, most likely ones first."""
    from ...core.recipe import parse

    now = getattr(parse(part(name, **f.metadata.get("beside", {})))[0], f.name)
    if told := f.metadata.get("other", ()):
        yield from (v for v in told if v != now)
        return
    hint = typing.get_type_hints(method_of(name))[f.name]
    if typing.get_origin(hint) is typing.Literal:
        yield from (v for v in typing.get_args(hint) if v != now)
    elif isinstance(now, bool):
        yield not now
    elif isinstance(now, int):
        yield from (v for v in (now * 2, now + 1, now - 1, now // 2) if v != now)
    elif isinstance(now, float):
        yield from (v for v in (now / 2, now * 2, 0.5, 0.1) if v != now and math.isfinite(v))
    elif isinstance(now, tuple) and now and all(isinstance(v, float) for v in now):
        yield tuple(v / 2 for v in now)


#: how a refusal ends that says where a whole number begins, and no more
BEGINS = re.compile(r"(?:at least (\d+)|(\d+) or more)(?: (?:is|are) expected)?(?:;.*)?$")


def every_bound_is_the_one_that_is_said(name: str, model: str) -> Skip | None:
    """Where none of a whole number is refused with "expected at least 1" (or "1 or more"), the
    bound itself is not, and what is below it is; a rank of 1 fits where others do."""
    found = [f for f in own(name) if _whole(name, f)]
    for f in found:
        def refused(value: int, f: Field[Any] = f) -> str:
            return _refused(name, model, **{**f.metadata.get("beside", {}), f.name: value})

        none = refused(0)
        bound = 1 if f.name == "rank" and "does not fit" in none else _begins(f.name, none)
        if bound is None:
            continue
        again = refused(bound)
        assert _plain(again) != _plain(none), f"{f.name}={bound} is refused: {again}"
        assert not bound or refused(bound - 1), \
            f"{f.name}={bound - 1} is accepted, and 0 refused: {none}"
    return None if found else Skip("has no settings that are whole numbers")


def _begins(setting: str, words: str) -> int | None:
    """The bound in a refusal that names this setting, or shows it alone, and one number."""
    words = words.partition(", got ")[0]
    shown = re.findall(r"(\w+)=", words)
    rest = re.sub(r"\w+=[^\s,:)]*", "", words)
    said, numbers = BEGINS.search(rest), re.findall(r"(?<![\w.])\d", rest)
    named = setting in rest or shown == [setting]
    return int(said[1] or said[2]) if said and named and len(numbers) == 1 else None


def _whole(name: str, f: Field[Any]) -> bool:
    hint = typing.get_type_hints(method_of(name))[f.name]
    return int in (hint, *typing.get_args(hint))


def _refused(name: str, model: str, **given: Any) -> str:
    """With which words; empty where it is not."""
    try:
        text = recipe(name, **given)
        tune(fresh(model)[0], text, targets=split(model)[1], head=False,
             calibration=data(model, torch.float32, text))
    except BurnishError as e:
        return str(e)
    return ""


def _plain(words: str) -> str:
    """Without numbers: of a bound at two values the words are the same."""
    return re.sub(r"-?\d+", "#", words)


def what_it_claims_is_of_its_targets(name: str, model: str) -> Skip | None:
    """Where what a method claims for itself alone depends on its targets, it names them: two of it
    stand beside each other on different ones."""
    given = dict(method_of(name).small)
    free = set(make(name, given).claims())
    there = set(make(name, {**given, "targets": "there"}).claims())
    if there == free:
        return Skip("claims nothing on its targets")
    assert all("there" in claim for claim in there - free), \
        f"claims {sorted(there - free)} on targets='there'"
    return None


ONCE = (every_setting_acts, every_bound_is_the_one_that_is_said, what_it_claims_is_of_its_targets)
