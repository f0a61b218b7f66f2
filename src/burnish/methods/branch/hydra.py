from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.heads import Head
from ...core.asked import wanted
from ...core.errors import RankError, RecipeError
from ...core.method import Method, setting
from ...core.needs import mlp_linears
from ...core.site import Branch, Place
from ..delta.lowrank.lora import check_dropout
from ..mixture._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Hydra(Method):
    """Hydra: two low-rank heads on a linear, one of its input and one of its result.

    ``f = W x + b``, ``y = f + s B_p A_p x + s B_s A_s f`` with A_p (rank, in), B_p (out, rank), A_s
    (sequential, out), B_s (out, sequential). The second learns combinations of what the layer has
    learnt: its update B_s A_s W has the rows of W. ``bias=True`` gives all four a bias; dropout is
    between A and B. With sequential=0 it is a LoRA, with rank=0 the sequential head alone. By
    default it stands on the last matrix of every MLP. It is no mixture (HydraLoRA is).

    Start: A_p, A_s as `init` says ("kaiming" uniform, "normal" of 0.02, "xavier" uniform: the
    authors' for language, CLIP and VTAB), B and biases 0: the pre-trained function exactly. Trains
    rank (in + out) + 2 sequential out per matrix. Kept for backward: x, f, and rank + sequential
    numbers per token. Merges exactly: ``W + s (B_p A_p + B_s A_s W)``, and the bias
    ``b + s B_s A_s b``; over a quantised W too, which is decoded for it.
    """

    paper: ClassVar[str] = ("Hydra: Multi-head Low-rank Adaptation for Parameter Efficient "
                            "Fine-tuning (2023), arXiv:2309.06922")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"last matrices"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    rank: int = setting(4, "of the head that reads the input; 0 leaves it out", alias=("r",))
    sequential: int = setting(8, "rank of the head that reads the result; 0 leaves it out")
    scale: float = setting(1.0, "s, what both heads are multiplied by")
    dropout: float = setting(0.0, "dropout between the two factors of a head")
    bias: bool = setting(False, "give every factor a bias")
    init: Literal["kaiming", "normal", "xavier"] = setting("kaiming", "start of the first factors")

    def __post_init__(self) -> None:
        check_dropout("hydra", self.dropout)
        if min(self.rank, self.sequential) < 0 or not self.rank + self.sequential:
            raise RecipeError(f"hydra(rank={self.rank}, sequential={self.sequential}): expected a "
                              "rank above 0 for one head at least")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        places = [p for p in mlp_linears(anatomy) if p.role in ("fc2", "down")] \
            if asked is None else asked
        for place, rows, out in linears(anatomy, self, places, anywhere=True,
                                        rank=self.rank or None):
            n = out if rows is None else sum(b - a for a, b in rows)
            if self.sequential > n:
                raise RankError(f"hydra: sequential={self.sequential} does not fit the {n} results "
                                f"of {place.name}; the largest rank there is {n}")

            def head(of: Literal["input", "output"], rank: int, place: Place = place,
                     rows: tuple[tuple[int, int], ...] | None = rows, out: int = out) -> Branch:
                made = Head(place.inp, out, rank, of=of, scale=self.scale, dropout=self.dropout,
                            bias=self.bias, rows=rows, init=self.init)
                return Branch(place.path, made, read=(place.path, of))

            if self.sequential:                      # first: it reads f, not what is added to it
                yield head("output", self.sequential)
            if self.rank:
                yield head("input", self.rank)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        heads = (self.rank > 0) + (self.sequential > 0)
        biases = self.bias * (self.rank + self.sequential + heads * place.out)
        return self.rank * (place.inp + place.out) + 2 * self.sequential * place.out + biases
