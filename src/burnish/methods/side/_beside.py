"""What a side network stands beside: a backbone that is frozen, runs without a graph and drops
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...blocks.state.tap_cache import TapCache
from ...blocks.state.taps import Still
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ..branch._sites import samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block


@dataclass(frozen=True, kw_only=True)
class Cached(Method):
    """A side network that may keep what the backbone's blocks return in a folder.

    With ``cache="folder"`` no block runs for a batch whose samples have all been seen before, in
    training or evaluation, in any order and batch size, in this run or another of the same
    backbone; blocks/state/tap_cache.py says how. The bytes are those of the first time.
    """

    cache: str | None = setting(None, "folder that keeps the backbone's states; None: none",
                                unseen="no number of a run changes: tests/blocks/test_tap_cache.py")
    cache_gb: float = setting(32.0, "most that folder holds, in 10^9 bytes",
                              unseen="no number of a run changes: tests/blocks/test_tap_cache.py")

    def __post_init__(self) -> None:
        if not 0 < self.cache_gb < float("inf"):
            raise RecipeError(f"{self.name}(cache_gb={self.cache_gb}): more than 0, and a number")
        if self.cache is None and self.cache_gb != Cached.cache_gb:
            raise RecipeError(f"{self.name}(cache_gb={self.cache_gb}) bounds a folder, and there "
                              "is none: give cache='folder', or leave cache_gb out")
        if self.cache == "":
            raise RecipeError(f"{self.name}(cache=''): expected a folder, or None")

    def finished(self) -> Method:
        """Without the folder: an adapter is read on other machines."""
        return replace(self, cache=None, cache_gb=Cached.cache_gb)

    def keeping(self, attacher: Any, blocks: Sequence[Block]) -> TapCache | None:
        """What keeps the states of a run of blocks."""
        if self.cache is None:
            return None
        samples_first(attacher.anatomy, self)
        return TapCache(self.name, attacher.adapter.name,
                        [attacher.model.get_submodule(b.path) for b in blocks],
                        self.cache, round(self.cache_gb * 1e9))


def width(anatomy: Anatomy, part: Method, stacks: Sequence[Sequence[Block]]) -> int:
    """The one width of the residual stream."""
    blocks = [b for stack in stacks for b in stack]
    d = blocks[0].hidden_size or anatomy.hidden_size
    if d is None or len({b.hidden_size for b in blocks}) > 1:
        raise RecipeError(f"{part.name}: the blocks have different widths; a side network has one")
    return d


def narrowed(part: Any, d: int) -> int:
    """S = d / reduction, the width of what a part gathers beside a stream of width d."""
    if d % part.reduction:
        fits = [r for r in (1, 2, 4, 8, 16) if d % r == 0]
        raise RecipeError(f"{part.name}(reduction={part.reduction}): the width = {d} is not "
                          f"divisible by it; {', '.join(map(str, fits))} are possible")
    return int(d // part.reduction)


def still(attacher: Any, part: Method, stacks: Sequence[Sequence[Block]]) -> None:
    """The backbone drops nothing, run as a whole or in parts (without the head; an encoder)."""
    name, names_of = attacher.adapter.name, [b[0].stack.split(".") for b in stacks]
    above = {p for names in names_of for p in _prefixes(names[:-1])}
    stems = {names[0] for names in names_of if len(names) > 1}
    heads = [next(p for p in _prefixes(h.split(".")) if p not in above)
             for h in attacher.anatomy.head]             # with what stands beside it: its dropout
    inside = {p: x for p, x in attacher.model.named_modules()
              if p and "burnish" not in p.split(".")
              and not any(f"{p}.".startswith(f"{h}.") for h in heads)
              and (not stems or p.split(".")[0] in stems)}
    Still(attacher.state, name, list(inside.values())).listen(attacher.slot(""), part.name)
    for top in sorted(above):
        mine = [x for p, x in inside.items() if f"{p}.".startswith(f"{top}.")]
        Still(attacher.state, name, mine, part=True).listen(attacher.slot(top), part.name)


def frozen(attacher: Any, part: Method, behind: tuple[str, ...]) -> None:
    """RecipeError where something trains that is not behind the side network.

    behind: how the names of what may train begin (the head, the last norm)."""
    name = attacher.adapter.name
    own = [n for n, p in attacher.model.named_parameters()
           if f".burnish.{name}." in f".{n}" and p.requires_grad]
    for n in (*own, *attacher.adapter.selected):
        if not n.startswith(behind):
            raise RecipeError(f"{part.name} runs the backbone without a graph, so {n} could "
                              "not train: drop that part of the recipe")


def _prefixes(names: list[str]) -> list[str]:
    """The paths of a module and of those above it, the outermost first."""
    return [".".join(names[: n + 1]) for n in range(len(names))]
