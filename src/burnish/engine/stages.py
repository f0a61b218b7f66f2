"""Carrying out the stages of a run, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.errors import ConfigError, DataError, RecipeError, nearest
from ..core.method import Method
from ..core.recipe import Recipe, parse
from ..core.stage import Stage, label, shares
from .adapters import Adapter, check_name

if TYPE_CHECKING:
    from .tuned import Tuned


def divides(recipe: Recipe) -> Method | None:
    """The part that divides a run into stages; None where it is one stretch."""
    return next((m for m in recipe if m.divides()), None)


def stages_of(tuned: Tuned, tasks: Sequence[str] = ()) -> list[Stage]:
    """The stages of the recipe over `tasks`, checked; none where the run is one stretch.

    Raises ConfigError for tasks that nothing divides a run over, and for a stage that names an
    adapter or data that there will not be; RecipeError where a part cannot rest for a stage.
    """
    part = divides(tuned.recipe)
    stages = list(part.stages(tuned, tasks)) if part is not None else []
    if tasks and not stages:
        raise ConfigError(f"{tuned.recipe} trains in one stretch, and there are {len(tasks)} tasks "
                          f"({', '.join(tasks)}): a part such as o_lora trains one after the other")
    known: dict[str, Adapter | None] = dict(tuned.adapters)
    for i, stage in enumerate(stages):
        _check(tuned, stage, label(stages, i), known, tasks)
    return stages


def _check(tuned: Tuned, stage: Stage, name: str, known: dict[str, Any],
           tasks: Sequence[str]) -> None:
    if stage.trains not in known:
        if stage.recipe is None:
            raise ConfigError(f"stage {name} trains {stage.trains!r}, which is no adapter yet, and "
                              "brings no recipe for it")
        check_name(stage.trains, known)
        known[stage.trains] = None
    for other in stage.beside:
        if other not in known:
            raise ConfigError(f"stage {name} has {other!r} beside it, which is no adapter by then"
                              f"{nearest(other, known)} (there is {', '.join(known)})")
    if stage.data is not None and stage.data not in tasks:
        raise ConfigError(f"stage {name} trains on {stage.data!r}, which is none of the data"
                          f"{nearest(str(stage.data), tasks)} (there is "
                          f"{', '.join(tasks) or 'one without a name'})")
    if stage.only is None:
        return
    here = tuned.adapters.get(stage.trains)
    recipe = here.recipe if here is not None else parse(stage.recipe)
    for m in recipe:
        if {"controller"} & set(m.axes()):
            raise RecipeError(f"stage {name} trains only some of the tensors, and {m.name} counts "
                              f"on all of them; leave {m.name} out")


def begin(tuned: Tuned, stage: Stage, **words: Any) -> None:
    """Who trains and who is active, as the stage says; everything but the optimizer.

    words: for ``tuned.add``, where the stage says nothing of them. A new adapter has the targets of
    the first if its recipe is the same, a seed of its own, and the base in the form it has.
    """
    if stage.trains not in tuned.adapters:
        if stage.recipe is None:
            raise ConfigError(f"a stage trains {stage.trains!r}, which is no adapter yet, and "
                              "brings no recipe for it")
        first = next(iter(tuned.adapters.values()))
        recipe = parse(stage.recipe)
        own: dict[str, Any] = {"seed": first.seed + len(tuned.adapters)}
        if str(recipe) == str(first.recipe):
            own["targets"] = first.targets
        tuned.add(stage.trains, _standing(recipe, first.recipe), **{**own, **words, **stage.add})
    tuned.use({**stage.beside, stage.trains: 1.0}, train=stage.trains)
    if stage.only is not None:
        _narrow(tuned, stage)


def _standing(recipe: Recipe, first: Recipe) -> Recipe:
    """Without the parts that hold the base: it stands already as the first recipe holds it."""
    held = {str(m) for m in first if "storage" in m.axes()}
    return Recipe(m for m in recipe if str(m) not in held)


def _narrow(tuned: Tuned, stage: Stage) -> None:
    """Let only some of what trains train, until the next ``use``."""
    assert stage.only is not None
    named = list(tuned.named_parameters())
    rest = [p for n, p in named if not stage.only(n)]
    if len(rest) == len(named):
        raise ConfigError(f"a stage of {stage.trains!r} trains only some of its {len(named)} "
                          f"tensors, and none is left: {', '.join(n for n, _ in named[:3])}, ...")
    for p in rest:
        p.requires_grad_(False)


def run(tuned: Tuned, stages: Iterable[Stage], data: Callable[[Stage], Iterable[Any]],
        loss: Callable[[Any, Any], Tensor] | None = None, total: int | None = None,
        **optimizer: Any) -> Iterator[tuple[Stage, int, Tensor]]:
    """See :meth:`burnish.Tuned.run`."""
    counts: Mapping[int, int] = {}
    if total is not None:
        stages = list(stages)
        counts = dict(enumerate(shares(stages, total, [1] * len(stages))))
    for i, stage in enumerate(stages):
        count = counts.get(i, stage.until)
        if isinstance(count, float):
            raise ConfigError(f"a stage of {stage.trains!r} takes {count:g} of the run: say how "
                              "long that is with run(..., total=updates)")
        begin(tuned, stage)
        tuned.total_steps = count
        tuned.optimizer(**{**optimizer, **stage.optimizer})
        done = 0
        for batch in data(stage):
            if count is not None and done >= count:
                break
            yield stage, done, tuned.step(batch, loss)
            done += 1
        if not done or count is not None and done < count:
            raise DataError(f"the data of stage {stage.trains!r} ended after {done} updates"
                            + (f" of {count}" if count is not None else ""))
        if stage.then is not None:
            stage.then(tuned)
