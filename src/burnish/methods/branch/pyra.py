from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.attending import open_attentions
from ...blocks.state.merging import Half, Merging, Modulated
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ..prompt.vpt import special_tokens
from ._sites import post_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.protocols import Attacher

#: pairs per block that the paper merges, by how many blocks there are
SCHEDULES = {
    ("low", 12): (16,) * 11 + (10,), ("low", 24): (8,) * 23 + (6,),
    ("high", 12): (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
    ("high", 24): (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1)}


@dataclass(frozen=True, kw_only=True)
class Pyra(Method):
    """PYRA: tokens of a vision transformer merge in every block (ToMe), modulated as they do.

    ``x <- x + Attn(LN x)``; r pairs become one token each; ``x <- x + MLP(LN x)``. Tokens at even
    places look for the most alike among those at odd places, by keys averaged over heads at unit
    length, and the r strongest edges merge: with sizes s (1 at first) and X = s x, the partner gets
    ``X <- X + src'`` and the sum of sizes, x = X / s. Of the sources src (r, d) and their partners

        src' = src + (src * d_D) * d_T,         P = LN(src + partner)
        d_D = 2 sigmoid(a^T P) (1, d),          d_T = 2 sigmoid(P b^T) - 1 (r, 1)

    Class and distillation tokens are none of them. ``proportional=True`` adds log s to the scores
    of keys (in training too). `merged` says r: a number, one for each block, or "low" or "high",
    the paper's for 12 and 24 blocks. ``modulate=False`` is ToMe, which trains nothing.

    Start: a U(-1, 1), b = 0: ToMe, not the model that merges nothing. Trains r + 3 d per block that
    merges, and what stands beside it (the paper: ``lora(rank=8, targets='q,k,v') + pyra``).
    Kept for backward: what blocks keep, for ever fewer tokens, and some r d numbers. Not mergeable.

    A head that averages tokens averages what is left, whatever it stands for; where it reads the
    class token alone, what the last block merges moves nothing (the paper counts it). Blocks that
    normalise last, or run again in backward, are refused.
    """

    paper: ClassVar[str] = ("PYRA: Parallel Yielding Re-Activation for Training-Inference "
                            "Efficient Task Adaptation (2024), arXiv:2403.09192")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"merged": (3, 0)}

    merged: int | str | tuple[int, ...] = setting("low", "pairs that become one, of each block",
                                                  other=(2,))
    modulate: bool = setting(True, "False: plain merging",
                             unseen="of itself nothing trains then: tests/methods/test_pyra.py")
    proportional: bool = setting(True, "a token counts in attention for as many as it stands for")

    def __post_init__(self) -> None:
        given = self.merged if isinstance(self.merged, list | tuple) else (self.merged,)
        if any(r < 0 if isinstance(r, int) else r not in ("low", "high") for r in given):
            raise RecipeError(f"pyra(merged={self.merged!r}): expected 'low', 'high', a number of "
                              "pairs, or one for each block")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks", "how attention is computed", "which tokens go on")

    def pairs(self, blocks: int) -> tuple[int, ...]:
        if isinstance(self.merged, int):
            return (self.merged,) * blocks
        found = SCHEDULES.get((self.merged, blocks)) if isinstance(self.merged, str) \
            else tuple(self.merged)
        if found is None or len(found) != blocks:
            raise RecipeError(f"{self} is not of {blocks} blocks: give a number of pairs, or one "
                              "for each block")
        return found

    def branch(self, anatomy: Anatomy) -> Iterable[Merges]:
        if self.targets is not None:
            raise RecipeError("pyra takes no targets: it stands in all blocks (merged=0 in some)")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        open_attentions(anatomy, self.name)
        blocks = anatomy.blocks
        for b, r in zip(blocks, self.pairs(len(blocks)), strict=True):
            if post_norm(anatomy, b) or not (b.mlp or b.mlp_out):
                raise RecipeError(f"pyra: {b.path} is no attention and MLP behind a norm each")
            yield Merges(self, b, r, b is blocks[0], b is blocks[-1])

    def count(self, d: int, r: int) -> int:
        """Trainable parameters of a block of width d that merges r pairs."""
        return r + 3 * d if r and self.modulate else 0


@dataclass(frozen=True)
class Merges:
    """One block merges r pairs of its tokens."""

    method: Pyra
    block: Block
    r: int
    first: bool
    last: bool

    def install(self, attacher: Attacher, part: Method) -> None:
        m, b, state, name = self.method, self.block, attacher.state, attacher.adapter.name
        assert b.attn and b.hidden_size
        Half(state, name, "attention").listen(attacher.slot(b.attn), part.name)
        Half(state, name, "mlp").listen(attacher.slot(b.mlp or b.mlp_out or ""), part.name)
        change = Modulated(self.r, b.hidden_size) if m.count(1, self.r) else None
        made = Merging(state, name, self.r, change, proportional=m.proportional, first=self.first,
                       last=self.last, protected=special_tokens(attacher.model, b.stack))
        made.to(attacher.device(b.path)).listen(attacher.slot(b.path), part.name)
