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
    listener's from then on. joined: of the blocks in a mode, those that run again together with
    the block before them (rerun.py).
    """

    paths: tuple[str, ...]
    run: str | Callable[[int, Any], Any]
    joined: frozenset[str] = frozenset()

    def install(self, attacher: Attacher, part: Method) -> None:
        """Take the blocks over. RecipeError when another part runs one of them."""
        if self.joined or self.run == "selective checkpoint":
            attacher.state.tape.beside = "several blocks run again as one" if self.joined else \
                "blocks run again with what they keep"
        for i, path in enumerate(self.paths):
            slot = attacher.slot(path)
            mine = part.name if not isinstance(self.run, str) else \
                f"joined {self.run}" if path in self.joined else self.run
            taken = [slot.mode] if slot.mode else []
            taken += [w for x in slot.listeners if (w := getattr(x, MARK, None))]
            if any(w != mine for w in taken) or taken and not isinstance(self.run, str):
                raise RecipeError(f"{path} already runs in mode {taken[0]!r}; a block has one "
                                  f"mode, {part.name} asks for {mine!r}")
            if isinstance(self.run, str):
                slot.mode = mine
                continue
            listener = self.run(i, attacher)
            setattr(listener, MARK, mine)
            listener.listen(slot, f"{part.name}_run")
