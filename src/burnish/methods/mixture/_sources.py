"""Adapters of other tasks, combined for a new one: how they come together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.sources import Sources
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.stage import Stage

if TYPE_CHECKING:
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class FromSources(Method):
    """What combines frozen `pfeiffer` adapters, one behind the MLP of every block and task."""

    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    sources: int = setting(2, "adapters that are combined")
    reduction: int = setting(16, "d over the width of a source")
    act: str = setting("relu", "activation inside", other=("gelu",))

    def __post_init__(self) -> None:
        if self.sources < 1 or self.reduction < 1:
            raise RecipeError(f"{self}: expected sources and reduction of at least 1")

    def width(self, d: int) -> int:
        """Of one source on a state of width d."""
        return max(1, d // self.reduction)

    def stages(self, tuned: Any, tasks: Sequence[str]) -> Iterator[Stage]:
        """A source adapter on each task but the last, alone; then their combination on that."""
        if not tasks:
            return
        if len(tasks) != self.sources + 1:
            raise RecipeError(f"{self}: {self.sources} sources and a target are {self.sources + 1} "
                              f"tasks, not {len(tasks)} ({', '.join(tasks)})")
        name = tuned.training or next(iter(tuned.adapters))
        first, sources = tuned.adapters[name], list(tasks[:-1])
        recipe = make("pfeiffer", {"reduction": self.reduction, "act": self.act,
                                   "targets": self.targets})
        for task in sources:
            last = partial(self.gather, sources=sources, name=name) if task == sources[-1] else None
            yield Stage(task, str(recipe), data=task, then=last,
                        add={"targets": first.targets, "head": first.head})
        yield Stage(name, data=tasks[-1])

    def combine(self, tuned: Any, name: str, sources: Sequence[str]) -> None:
        """Add an adapter `name` with this part that combines the adapters `sources`, and use it."""
        if len(sources) != self.sources:
            raise RecipeError(f"{self}: expected {self.sources} sources, not {len(sources)}")
        for source in sources:
            tuned.adapters.known(source)
        old = tuned.adapters[sources[0]]
        tuned.add(name, str(self), targets=old.targets, head=old.head)
        try:
            self.gather(tuned, sources, name)
        except RecipeError:
            tuned.remove(name)
            raise
        tuned.use(name)

    def gather(self, tuned: Tuned, sources: Sequence[str], name: str) -> None:
        """Give the adapter `name` what the others have learnt."""
        mine = dict(tuned.branches(Sources, name))          # type: ignore[attr-defined]
        for n, source in enumerate(sources):
            found = list(tuned.branches(Bottleneck, source))       # type: ignore[attr-defined]
            theirs = dict(found)
            if theirs.keys() != mine.keys():
                odd = min(theirs.keys() ^ mine.keys())
                raise RecipeError(f"{self.name} combines bottlenecks behind the same modules, and "
                                  f"{source!r} differs from it at {odd}")
            if several := [path for path, b in found if theirs[path] is not b]:
                raise RecipeError(f"{self.name} combines one bottleneck of each source, and "
                                  f"{source!r} has several at {several[0]}")
            for path, m in mine.items():
                if (how := _stands(tuned, path, theirs[path])) != (own := _stands(tuned, path, m)):
                    raise RecipeError(f"{self.name} {own}, and what {source!r} has there {how}: "
                                      "expected a source of the form of pfeiffer")
                m.take(n, theirs[path], f"{source!r} at {path}")


def _stands(tuned: Any, path: str, own: Any) -> str:
    """What a branch reads there, and how its result comes in."""
    slot = tuned.model.get_submodule(f"{path}.burnish")
    branch = next(p.branch for p in slot.parts if p.branch and slot.module_of(p) is own)
    where, what = branch.read
    return f"reads the {what} of {where or path} ({branch.compose} at the {branch.at})"
