from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.weight.shared import Shared
from ...core.errors import RecipeError
from ...core.method import Method
from ...core.processes import assign
from ...core.recipe import Recipe

#: axes of parts whose tensors are what was learnt
LEARNS = {"delta", "select", "branch", "prompt", "side", "mixture"}


@dataclass(frozen=True, kw_only=True)
class Pvp(Method):
    """PVP: what is tuned is trained on a large set first, and goes on from there on a small one.

    Stage 1: ``min over psi and a head of CE(source)``, the backbone frozen. Stage 2: psi begins at
    its values of stage 1, under a fresh head and a fresh optimizer. psi is whatever a recipe adds
    or selects outside the head: prompts (`vpt`), low-rank updates, adapters, biases.

    Two runs: ``burnish.fit(base, source, recipe, output="first")``, then ``burnish.fit(base,
    target, recipe, init_from="first")``; beside one's own loop ``begin_from(tuned, "first")`` of
    burnish.formats.warm. Both recipes must add the same, setting by setting, to one base; all that
    belongs to the head, and what stands on it, is left out, so that classes may be others. Parts
    whose finished file has another form (rows instead of what makes them) begin from a checkpoint.
    What is learnt beside tensors that the adapter's seed draws (`vera`) goes on under that seed.

    Start: of stage 2 what stage 1 left. Trains, keeps and merges as the recipe does. (MVLPT's
    transfer from a prompt of many tasks is this too.)
    """

    paper: ClassVar[str] = "PVP: Pre-trained Visual Parameter-Efficient Tuning (2023)"
    tier: ClassVar[str] = "from the text"

    def lifecycle(self, tuned: Any, earlier: Mapping[str, Tensor], recipe: Recipe,
                  adapter: str = "default", seed: int | None = None) -> list[str]:
        """Give the adapter that trains the values of an earlier one, all but the head's; returns
        the names that were left out.

        earlier: the tensors of its file. recipe, adapter, seed: what it was, its name there, and
        the seed it was drawn from (None: unknown, which is taken for this one's). Raises
        RecipeError where the two are not alike, and then nothing has been changed.
        """
        check_alike(recipe, tuned.recipe)
        mine = f".burnish.{tuned.training}."
        if seed not in (None, tuned.active.seed):
            for n, m in tuned.model.named_modules():
                if isinstance(m, Shared) and m.follows and mine in f".{n}.":
                    part = n.rpartition(".")[2].removesuffix("_shared")
                    raise RecipeError(f"{part} draws what it learns beside from the adapter's seed,"
                                      f" which was {seed} in the earlier adapter and is "
                                      f"{tuned.active.seed} here: tune with seed={seed}")
        found = {f".{n}".replace(f".burnish.{adapter}.", mine)[1:]: t for n, t in earlier.items()}
        inside = head_of(tuned.anatomy)
        values = {n: t for n, t in found.items() if not inside(n)}
        live = {n: t for n, t in tuned.tensors(tuned.training).items()
                if not inside(n) and (mine in f".{n}" or n in tuned.active.selected)}
        for n in sorted({*values, *live}):
            if n not in values or n not in live:
                raise RecipeError(f"{n} is {'new' if n in live else 'not'} here: the earlier "
                                  "adapter and this recipe do not add the same")
            if getattr(values[n], "shape", None) != getattr(live[n], "shape", None):
                raise RecipeError(f"{n} has shape {tuple(values[n].shape)} in the earlier adapter, "
                                  f"{tuple(live[n].shape)} here")
        with torch.no_grad():
            for n, t in live.items():
                assign(t, values[n])
        return sorted(set(found) - set(values))


def head_of(anatomy: Any) -> Callable[[str], bool]:
    """Is a tensor the head's, or of what stands on it?"""
    heads = tuple(f"{h}." for h in anatomy.head)
    return lambda name: bool(heads) and f"{name}.".startswith(heads)


def check_alike(earlier: Recipe, now: Recipe) -> None:
    """RecipeError with the first setting that differs in what two recipes add."""
    was, here = ([m for m in r if LEARNS & set(m.axes())] for r in (earlier, now))
    if [m.name for m in was] != [m.name for m in here]:
        raise RecipeError(f"the earlier adapter was {' + '.join(m.name for m in was)}, this recipe "
                          f"is {' + '.join(m.name for m in here)}: stage 2 goes on with the same")
    for a, b in zip(was, here, strict=True):
        for name, value in a.settings().items():
            if (other := b.settings()[name]) != value and name not in a.of_task:
                raise RecipeError(f"{a.name}: {name} was {value!r} in the earlier adapter, it is "
                                  f"{other!r} here")
