from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.weight.experts import ExpertChains
from ...core.asked import wanted
from ...core.errors import RankError, RecipeError, TargetError
from ...core.method import Method, setting
from ...core.site import Branch, Place
from ...core.targets import match

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
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    rank: int = setting(8, "rank of every expert", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    k: int = setting(2, "experts per token", alias=("top_k",))
    allocation: str = setting("2-4-6-8", "experts in equal groups of blocks, first to last",
                              other=("1-3",))
    dropout: float = setting(0.05, "dropout on the input of A", alias=("lora_dropout",))
    balance: float = setting(1e-3, "weight of the balance loss")

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
        by_path: dict[str, list[Place]] = {}
        for place in match(anatomy) if asked is None else asked:
            if place.kind in self.kinds and place.block is not None:
                by_path.setdefault(place.path, []).append(place)
            elif asked is not None:
                where = "outside them" if place.block is None else f"of kind {place.kind}"
                raise TargetError(f"mola has experts for linears inside blocks; {place.name} is "
                                  f"{where}")
        if not by_path:
            raise RecipeError("mola: none of the targets is a linear inside a block")
        stacks = {name: len(blocks) for name, blocks in anatomy.stacks().items()}
        largest = max(by_path, key=lambda p: min(by_path[p][0].out, by_path[p][0].inp))
        for path, places in by_path.items():
            first = places[0]
            block = anatomy.blocks[first.block]
            try:
                first.check_rank(self.rank, "mola")
            except RankError:
                if asked is not None or path == largest:
                    raise
                continue
            rows = tuple(sorted(p.rows for p in places if p.rows)) or None
            out = next(p.out for p in anatomy.places if p.path == path and not p.rows)
            if rows and rows[0][0] == 0 and sum(b - a for a, b in rows) == out:
                rows = None
            yield Branch(path, ExpertChains(
                first.inp, out, self.experts(block.index, stacks[block.stack]), self.rank, self.k,
                scale=self.alpha / self.rank, dropout=self.dropout, coefficient=self.balance,
                rows=rows), read=(path, "input"))

    def count(self, place: Place, blocks: int) -> int:
        """Trainable parameters on one matrix of a model of one stack with so many blocks."""
        per = self.rank * (place.inp + place.out) + place.inp
        return self.experts(place.block or 0, blocks) * per
