from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.connected import Aside
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.protocols import Attacher


@dataclass(frozen=True, kw_only=True)
class Connected(Method):
    """IAA: scattered modules joined by a path beside the blocks, which no frozen weight interrupts.

    Behind block l, which answers h_l (tokens, d),

        s_l = s_(l-1) + W_up act(W_down (h_l + s_(l-1)) + b) + b',   s_0 = 0,   h_l <- h_l + s_l

    so that of the loss to every step goes a path of identities and steps alone. The modules inside
    the blocks are parts beside it: ``houlsby + connected``, ``lora + connected``. Encoder, decoder
    and every stage have a path each.

    ``detach=True``: h_l is read without a gradient and the path joins behind the last block, a
    ladder beside the model: then nothing of the blocks is kept for it.

    Start: W_up and b' 0: the pre-trained function exactly. Trains 2 d r + r + d per block, r =
    `bottleneck` (599,424 on BERT-base at 32). Kept for backward: d + r numbers per token and block.
    Not mergeable. Blocks that run again in backward are refused.

    Unconfirmed: the paper's claim is what is built here (an aside path that makes all modules one);
    this equation is the best reading of it, not the paper's own.
    """

    paper: ClassVar[str] = ("Scattered or Connected? An Optimized Parameter-efficient Tuning "
                            "Approach for Information Retrieval (2022), arXiv:2208.09847")
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "even stacks"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(32, "r, width of the bottleneck")
    act: str = setting("gelu", "activation inside", other=("relu",))
    detach: bool = setting(False, "read beside the model, join at its end")

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise RecipeError(f"connected(bottleneck={self.bottleneck}): expected 1 or more")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def branch(self, anatomy: Anatomy) -> Iterable[Step]:
        if self.targets is not None:
            raise RecipeError("connected takes no targets: its path runs beside all blocks")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        for blocks in anatomy.stacks().values():
            mine = [b for b in blocks if b.attn]
            for b in mine:
                yield Step(self, b, b is mine[0], b is mine[-1])

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return Bottleneck.count(d, self.bottleneck)


@dataclass(frozen=True)
class Step:
    """Its step behind one block."""

    method: Connected
    block: Block
    first: bool
    last: bool

    def install(self, attacher: Attacher, part: Method) -> None:
        m, b = self.method, self.block
        if b.hidden_size is None:
            raise RecipeError(f"connected: the width of {b.path} cannot be told from its weights")
        made = Aside(attacher.state, attacher.adapter.name,
                     Bottleneck(b.hidden_size, m.bottleneck, act=m.act), first=self.first,
                     last=self.last, apart=m.detach)
        made.to(attacher.device(b.path)).listen(attacher.slot(b.path), part.name)
