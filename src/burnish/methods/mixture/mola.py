from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.weight.experts import ExpertChains
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place
from ...core.targets import match
from ..delta.lowrank.lora import check_dropout
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Mola(Method):
    """MoLA: several LoRA experts per linear, more of them in the higher layers.

    ``p = softmax(W_r x)``, the k largest divided by their sum are the gates g;
    ``y = W x + s sum_e g_e B_e A_e drop(x)``, s = alpha / rank. A (experts, rank, in),
    B (experts, out, rank), W_r (experts, in) without bias; routing is fp32.

    `allocation` gives the experts of equal groups of blocks, first to last: "2-4-6-8" is the
    paper's inverted triangle, "5-5-5-5" the rectangle. A layer with fewer than k experts uses all.
    Balance: ``balance * E sum_e f_e P_e`` per router (1 for a uniform router), f the share of
    (token, slot) pairs, P the mean probability. It is an objective: its gradient is added where the
    router's state passes, at the scale with which the loss of that forward goes backward
    (accumulation, loss scaling). Padding is left out where the
    model is called with ``attention_mask=(batch, tokens)``; without one every token counts.

    Start: B = 0, the pre-trained function exactly. Trains E (rank (in + out) + in) per matrix.
    Kept for backward: x once for all experts, E rank + E numbers per token.
    Not mergeable: the update depends on the token. No weight decay.
    """

    paper: ClassVar[str] = "MoLA: Higher Layers Need More LoRA Experts (2024), arXiv:2402.08562"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    rank: int = setting(8, "rank of every expert", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    k: int = setting(2, "experts per token", alias=("top_k",), least=1)
    allocation: str = setting("2-4-6-8", "experts in equal groups of blocks, first to last",
                              other=("1-3",))
    dropout: float = setting(0.05, "dropout on the input of A", alias=("lora_dropout",))
    balance: float = setting(1e-3, "weight of the balance loss")

    def __post_init__(self) -> None:
        check_dropout("mola", self.dropout)

    def repeats(self) -> int | None:
        return 1 if len(set(self.allocation.split("-"))) == 1 else None

    def experts(self, block: int, blocks: int) -> int:
        """Experts per linear in one block."""
        try:
            groups = [int(n) for n in self.allocation.split("-")]
        except ValueError:
            groups = []
        if not groups or min(groups) < 1:
            raise RecipeError(f"mola(allocation={self.allocation!r}): expected numbers of experts "
                              "joined by '-', first blocks first, e.g. '2-4-6-8'")
        return groups[block * len(groups) // blocks]

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        stacks = {name: len(blocks) for name, blocks in anatomy.stacks().items()}
        places = match(anatomy) if asked is None else asked
        for place, rows, out in linears(anatomy, self, places, rank=self.rank):
            block = anatomy.blocks[place.block]
            yield Branch(place.path, ExpertChains(
                place.inp, out, self.experts(block.index, stacks[block.stack]), self.rank, self.k,
                scale=self.alpha / self.rank, dropout=self.dropout, coefficient=self.balance,
                rows=rows), read=(place.path, "input"))

    def count(self, place: Place, blocks: int) -> int:
        """Trainable parameters on one matrix of a model of one stack with so many blocks."""
        per = self.rank * (place.inp + place.out) + place.inp
        return self.experts(place.block or 0, blocks) * per
