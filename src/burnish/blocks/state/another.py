"""Another adapter beside the one in use: the same recipe with one of its parts in another form.

What follows the sample (its task, its condition) is a plain update once that is settled, and what
has trained may go on in a larger form. The new adapter saves, merges and trains like any other;
the one it was made from stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...core.errors import RecipeError, TargetError
from ...core.method import Method

#: path of a module -> the tensors of what a part adds there, by name
Values = Mapping[str, Mapping[str, Tensor]]


def beside(tuned: Any, part: Method, name: str, others: Sequence[tuple[Method, Values]]) -> None:
    """Add the adapter `name`, and use it: the recipe that trains with `others` for its `part`,
    each with the values it begins from, no two of one name at one path.

    All else has the values that it has now: what trains, what other parts hold frozen, statistics.
    RecipeError where `part` is not of this recipe, and where another part is called as one of the
    others is and stands at one of its paths: which is which could not be told. Whatever is raised,
    there is no such adapter then, and the one that was in use is.
    """
    if part not in tuned.recipe:
        raise RecipeError(f"{part} is no part of the recipe that trains, {tuned.recipe}")
    old = tuned.adapters[tuned.training]
    after, before = f".burnish.{name}.", f".burnish.{old.name}."
    homes: dict[str, Mapping[str, Tensor]] = {}
    for other, values in others:
        for path, tensors in values.items():
            slot = tuned.model.get_submodule(f"{path}{before[:-1]}".lstrip("."))
            if other.name != part.name and other.name in slot:
                raise RecipeError(f"{part.name} would become a {other.name} in {path}, where the "
                                  f"recipe has one already: merge or drop that one first")
            homes[f"{path}{after}{other.name}".lstrip(".")] = tensors
    held = {n: t.detach().clone() for n, t in _whole(tuned, before, part)}
    moved = tuned.buffers.moved() if old.away is None else \
        {n: t for n, t in old.away.items() if n not in old.selected}
    recipe = [m for p in tuned.recipe for m in ([o for o, _ in others] if p == part else [p])]
    try:
        tuned.add(name, recipe, targets=old.targets, head=old.head)
    except TargetError:                          # what is left has targets of its own, or none
        tuned.add(name, recipe, head=old.head)

    def fill() -> None:
        tuned.use(name)
        own = tuple(f"{home}." for home in homes)
        for n, t in _whole(tuned, after, part):
            value = held.get(f".{n}".replace(after, before)[1:])
            if value is not None and not n.startswith(own):
                if value.shape != t.shape:
                    raise RecipeError(f"{n} would be {tuple(t.shape)}, and is {tuple(value.shape)} "
                                      f"in {old.name!r}: what has changed its size since it was "
                                      "made has no second beside it")
                t.copy_(value)
        for n, t in moved.items():
            tuned.buffers.stand(n, t)
        for home, tensors in homes.items():
            tuned.model.get_submodule(home).load_state_dict(dict(tensors))

    try:
        with torch.no_grad():
            tuned.change(fill)                   # or another stays in use
    except BaseException:
        tuned.remove(name)
        raise


def _whole(tuned: Any, home: str, part: Method) -> Iterator[tuple[str, Tensor]]:
    """What trains, and what else the adapter at `home` holds but for `part`."""
    yield from tuned.named_parameters()
    its = re.compile(rf"{re.escape(home)}{part.name}(_\d+)?\.")
    for n, t in chain(tuned.model.named_parameters(remove_duplicate=False),
                      tuned.model.named_buffers(remove_duplicate=False)):
        if home in f".{n}" and not its.search(f".{n}"):
            yield n, t
