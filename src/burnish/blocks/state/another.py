"""Another adapter beside the one in use: the same recipe with one of its parts in another form.

What follows the sample (its task, its condition) is a plain update once that is settled, and what
has trained may go on in a larger form. The new adapter saves, merges and trains like any other;
the one it was made from stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    All else that trains has the values that it has now. RecipeError where `part` is not of this
    recipe, and where another part is called as one of the others is and stands at one of its paths:
    which is which could not be told.
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
    held = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    recipe = [m for p in tuned.recipe for m in ([o for o, _ in others] if p == part else [p])]
    try:
        tuned.add(name, recipe, targets=old.targets, head=old.head)
    except TargetError:                          # what is left has targets of its own, or none
        tuned.add(name, recipe, head=old.head)
    tuned.use(name)
    own = tuple(f"{home}." for home in homes)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            value = held.get(f".{n}".replace(after, before)[1:])
            if value is not None and not n.startswith(own):
                p.copy_(value)
        for home, tensors in homes.items():
            tuned.model.get_submodule(home).load_state_dict(dict(tensors))
