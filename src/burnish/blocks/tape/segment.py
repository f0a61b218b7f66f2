"""A run of blocks that runs otherwise than stored: the answer to `activations` for whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import RecipeError

if TYPE_CHECKING:
    from ...core.method import Method
    from ...core.protocols import Attacher

#: attribute of a listener that says how its block runs
MARK = "runs_block"


@dataclass(frozen=True)
class Segment:
    """How the blocks at `paths` run, first to last.

    run: the name of a mode in which each block runs by itself (executor.MODES); or
    ``run(i, attacher) -> listener`` for blocks that hand something on: the i-th block's run is the
    listener's from then on.
    """

    paths: tuple[str, ...]
    run: str | Callable[[int, Any], Any]

    def install(self, attacher: Attacher, part: Method) -> None:
        """Take the blocks over. RecipeError when another part runs one of them."""
        for i, path in enumerate(self.paths):
            slot = attacher.slot(path)
            mine = self.run if isinstance(self.run, str) else part.name
            taken = [slot.mode] if slot.mode else []
            taken += [w for x in slot.listeners if (w := getattr(x, MARK, None))]
            if any(w != mine for w in taken) or taken and not isinstance(self.run, str):
                raise RecipeError(f"{path} already runs in mode {taken[0]!r}; a block has one "
                                  f"mode, {part.name} asks for {mine!r}")
            if isinstance(self.run, str):
                slot.mode = self.run
                continue
            listener = self.run(i, attacher)
            setattr(listener, MARK, mine)
            listener.listen(slot, f"{part.name}_run")
