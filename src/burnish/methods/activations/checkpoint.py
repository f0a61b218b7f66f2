from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.tape.segment import Segment
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Method):
    """Gradient checkpointing: keep a block's input, run the block again in backward.

    L blocks in segments of s (`every`): a segment keeps the input of its first block and runs again
    as one. In hidden states, with f of them kept by a block that runs stored,

        kept = ceil(L / s) + s f,   least near s = sqrt(L / f);   time: one more forward.

    s = 1 is best up to L = 2 f blocks or so: f is 10 in a pre-norm block on the lean tape, about
    ``1 + sum of the widths its matrices make / width``, which is what every=None takes for it.

    mode="selective" keeps what products, convolutions and attention make (f hidden states of a
    block, whatever the rest of it is made of) and runs norms, activations and dropout again: the
    time of a plain run. It takes less than that where a block is written out in small operations
    that the lean tape does not know.

    Gradients are those of the plain run, dropout included: the same operations on the same numbers
    (the generator's state is kept where something was drawn). The live segment is lean too. Works
    with frozen embeddings without a magic call; blocks in which nothing needs a gradient are not
    run again. A block that is given something else than what the block before it made keeps that.
    Inside somebody else's checkpointing each block runs again by itself; segments of several blocks
    run uncompiled.
    """

    paper: ClassVar[str] = "Training Deep Nets with Sublinear Memory Cost (2016), arXiv:1604.06174"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})

    every: int | None = setting(1, "s, keep the input of every s-th block; None: as takes least")
    mode: Literal["whole", "selective"] = setting(
        "whole", "selective: keep products and attention, run the rest again")

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise RecipeError(f"checkpoint(every={self.every}): a segment has 1 block or more; "
                              "None chooses")
        if self.mode == "selective" and self.every != 1:
            raise RecipeError(f"checkpoint(every={self.every}, mode='selective'): a block that "
                              "keeps what it makes has no use for a segment; leave one of them out")

    def repeats(self) -> int | None:
        return self.every

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def activations(self, anatomy: Anatomy) -> Segment:
        if not anatomy.blocks:
            raise RecipeError("checkpoint: no repeated blocks were found in this model")
        paths = tuple(b.path for b in anatomy.blocks)
        if self.mode == "selective":
            return Segment(paths, "selective checkpoint")
        joined = set()
        for blocks in anatomy.stacks().values():
            s = self.every or least(len(blocks), _stored(anatomy, blocks[-1]))
            joined |= {b.path for i, b in enumerate(blocks) if i % s}
        return Segment(paths, "checkpoint", frozenset(joined))


def least(blocks: int, stored: float) -> int:
    """The s for which ``ceil(blocks / s) + s * stored`` is least."""
    return min(range(1, blocks + 1), key=lambda s: -(-blocks // s) + s * stored)


def _stored(anatomy: Anatomy, block: Block) -> float:
    """f: hidden states that a block keeps when it runs stored. A block keeps its input and what
    its matrices make, which attention and activations read; the rest is made again from these."""
    width = block.hidden_size or anatomy.hidden_size
    return 1 + sum(p.out / width for p in anatomy.places
                   if p.path.startswith(f"{block.path}.") and p.kind != "embedding")
