from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.tape.segment import Segment
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Method):
    """Gradient checkpointing: keep a block's input, run the block again in backward.

    Memory of the blocks: one hidden state per block (`every` blocks) and one live block; time: one
    more forward. Gradients are those of the plain run, dropout included (the generator state is
    kept). The live block is lean too. Works with frozen embeddings without a magic call; blocks
    in which nothing needs a gradient are not recomputed.
    """

    paper: ClassVar[str] = "Training Deep Nets with Sublinear Memory Cost (2016), arXiv:1604.06174"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})

    every: int = setting(1, "checkpoint every n-th block and leave the others; 1: all")

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def activations(self, anatomy: Anatomy) -> Segment:
        if not anatomy.blocks:
            raise RecipeError("checkpoint: no repeated blocks were found in this model")
        return Segment(tuple(b.path for b in anatomy.blocks[:: self.every]), "checkpoint")
