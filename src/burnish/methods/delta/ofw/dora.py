from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.weight.factor import Chain
from ....blocks.weight.magnitude import Magnitude, Normed
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout, check_rate


@dataclass(frozen=True, kw_only=True)
class Dora(Method):
    """DoRA: the length of every row trains as a number, its direction as LoRA.

    ``W' = diag(m / c) V``, ``V = W + s B A``, ``c_o = ||V_o||_2`` held constant in the gradient;
    A (rank, in), B (out, rank), m (out,), s = alpha / rank, or alpha / sqrt(rank) with
    ``scaling="rs"``. The bias is not scaled.
    ``dm = rowsum(dW' * V) / c``. With ``hold_norm=False`` c is differentiated too, as weight
    normalisation does: rows of V are moved across their direction alone, at the price of W' and its
    gradient, a weight's size each, while a layer runs; without dropout.

    Start: LoRA's, m = row norms of the (dequantised) W: the pre-trained function to one rounding.
    Trains rank (in + out) + out per matrix. Kept for backward: what LoRA keeps and two numbers
    per output; neither the base's output nor V is kept, and V exists only panel by panel. dm takes
    the base's output again, as a product ``g^T x`` of W's size: three products where LoRA has two,
    1.3 to 1.5 times its step.
    Merges exactly. No weight decay on m or the factors. ``train_a=False`` freezes A: rank out + out
    train (x is kept all the same, for m). `b_rate` multiplies the learning rate of B. Experts are
    left to other methods. Embeddings: W is (width, vocabulary), so m has a number per coordinate;
    a look-up costs one pass over the table, for c, and keeps its index; the row of ``padding_idx``
    gives no gradient, to m neither (PEFT gives m one where that row is not zero).

    With dropout ``y = m / c * (W x + s B A drop(x)) + b`` and ``dm = sum_n g * (W x + s B A
    drop(x)) / c``. The authors, and PEFT, drop the input of all that differs from the base, at the
    price of a second base product: ``drop_base=True``, ``y = W x + (W' - W) drop(x) + b``, which
    keeps drop(x), of each layer its own. Refused on convolutions, whose weight is all a
    length can act on. In half precision the product is multiplied by its gain before it is
    rounded, so that a gain near 1 counts.
    """

    paper: ClassVar[str] = "DoRA: Weight-Decomposed Low-Rank Adaptation (2024), arXiv:2402.09353"
    tier: ClassVar[str] = "checked against the paper's numbers"
    excused: ClassVar[dict[str, str]] = {
        "its_dropout_is_differentiated":
            "the row norms are constants of the gradient by definition, so it is no derivative of "
            "the loss; tests/methods/test_dora.py holds the reference under dropout"}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha",
                                                "embedding"})

    rank: int = setting(8, "rank of the direction's update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    scaling: Literal["lora", "rs"] = setting("lora", "s = alpha/rank, or alpha/sqrt(rank)")
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    drop_base: bool = setting(False, "all that differs from the base sees the dropped input",
                              beside={"dropout": 0.5})
    hold_norm: bool = setting(True, "False: the gradient goes through the row norms too")
    train_a: bool = setting(True, "False freezes A")
    b_rate: float = setting(1.0, "learning rate of B relative to A and m")

    def __post_init__(self) -> None:
        check_dropout("dora", self.dropout)
        check_rate("dora", self.b_rate)
        if self.dropout and not self.hold_norm:
            raise RecipeError(f"dora(dropout={self.dropout}, hold_norm=False): norms are of a "
                              "weight, and with dropout each sample has another; set dropout=0")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rs" else self.rank)

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> tuple[Chain, Magnitude]:
        place, weight = site.place, site.weight
        place.check_rank(self.rank, "dora")
        inner = 0.0 if self.drop_base else self.dropout
        length = Magnitude if self.hold_norm else Normed
        terms = Chain(place, self.rank, self.scale, inner, self.train_a), length(weight)
        terms[1].dropout = self.dropout - inner
        for p in (terms[0].A, terms[0].B, terms[1].m):
            p.burnish_decay = False
        terms[0].B.burnish_lr = self.b_rate
        return terms

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank if self.hold_norm else 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + (place.inp if self.train_a else 0)) + place.out
