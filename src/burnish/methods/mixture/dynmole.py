from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.weight.entropic import EntropicChains, highest
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
class DynMole(Method):
    """DynMoLE: LoRA experts, as many of them for a token as its router is uncertain.

    ``y = W x + s sum_e w_e B_e A_e drop(x)``, ``p = softmax(W_g x)`` in fp32, s = alpha / rank.
    With ``S_q(p) = (1 - sum p^q) / (q - 1)`` (Tsallis; q = 1 is Shannon's): where S > uncertain,
    w = p, of all experts; elsewhere, in falling order of p, of those whose cumulative sum is at
    most top_p, and of the first `always`. w is not renormalised. A (experts, rank, in), B (experts,
    out, rank), W_g (experts, in) without bias.

    Added to the loss, means over routers: ``entropy mean S_q(p)``, which sharpens them, and
    ``balance experts sum_e mean(w_e) mean(p_e)``, over tokens that are no padding (where the model
    is called with ``attention_mask``). Departure: the means of the latter are a router's own, not
    pooled over layers, whose experts have nothing in common but a number: a layer that is out of
    balance would be made good by one that is out the other way. All experts are computed and those
    left out masked, as the authors' code does; what a sparse product would save is not saved.

    Start: A uniform in +-1/sqrt(in), W_g likewise, B = 0: the pre-trained function exactly. Trains
    experts (rank (in + out) + in) per matrix. Kept for backward: x once for all experts, experts
    rank numbers and a few times experts per token. Not mergeable: the update depends on the token.
    No weight decay. (Defaults but for experts, rank, alpha and top_p are unconfirmed.)
    """

    paper: ClassVar[str] = ("DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid "
                            "Routing Mechanism (2025), arXiv:2504.00661")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    rank: int = setting(8, "rank of every expert", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    experts: int = setting(8, "experts per linear", alias=("num_experts",))
    top_p: float = setting(0.75, "probability that the experts of a token may have together",
                           other=(0.2, 1.0), beside={"uncertain": 2.0, "always": 1, "index": 1.0})
    always: int = setting(2, "experts that answer in any case", alias=("keep_top_k",), other=(5,),
                        beside={"uncertain": 2.0, "top_p": 0.1, "index": 1.0})
    uncertain: float = setting(0.9, "entropy above which all experts answer",
                               alias=("entropy_threshold",), other=(1.8,))
    index: float = setting(1.1, "q, of the entropy; 1 is Shannon's", alias=("entropy_index",))
    dropout: float = setting(0.05, "dropout on the input of A", alias=("lora_dropout",))
    balance: float = setting(1e-3, "weight of the balance loss")
    entropy: float = setting(1e-2, "weight of the routers' entropy")

    def __post_init__(self) -> None:
        check_dropout("dynmole", self.dropout)
        if not 1 <= self.always <= self.experts or self.rank < 1:
            raise RecipeError(f"{self}: expected rank from 1, always from 1 to experts")
        if not 0 < self.top_p <= 1 or self.index <= 0 or self.balance < 0 or self.entropy < 0:
            raise RecipeError(f"{self}: expected top_p above 0 and up to 1, index above 0, "
                              "weights of the loss from 0")
        most = highest(self.experts, self.index)
        if not 0 <= self.uncertain < most and self.experts > self.always:
            raise RecipeError(f"dynmole(uncertain={self.uncertain}): the entropy of {self.experts} "
                              f"experts is from 0 to {most:.4g} for an index of {self.index}; "
                              "expected less, or all of them would never answer")

    def repeats(self) -> int | None:
        return None                              # a router's share of the loss is one of them all

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        sites = list(linears(anatomy, self, match(anatomy) if asked is None else asked,
                             rank=self.rank))
        for place, rows, out in sites:
            yield Branch(place.path, EntropicChains(
                place.inp, out, self.experts, self.rank, scale=self.alpha / self.rank,
                dropout=self.dropout, q=self.index, threshold=self.uncertain, top_p=self.top_p,
                always=self.always, entropy=self.entropy, balance=self.balance,
                share=1 / len(sites), rows=rows), read=(place.path, "input"))

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.experts * (self.rank * (place.inp + place.out) + place.inp)
