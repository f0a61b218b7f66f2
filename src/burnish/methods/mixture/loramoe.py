from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.weight.experts import DenseChains
from ...core.asked import narrowed
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import mlp_linears
from ...core.site import Branch, Place
from ..delta.lowrank.lora import check_dropout
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class LoraMoe(Method):
    """LoRAMoE: LoRA experts on the MLP's linears, all of them at work, in two balanced halves.

    ``y = W x + s sum_n w_n B_n A_n drop(x)``, w = softmax(W_g x) over all N experts in fp32,
    s = alpha / rank. A (N, rank, in), B (N, out, rank), W_g (N, in) without bias.

    Balance: the first half of the experts is for samples of type 1 (world knowledge), the second
    for type 0 (other tasks); the batch says which: ``sample_type``, one per sample. Per router
    Q[b, n] = sum over the tokens of w_n, I[b, n] = 1 + pull where the expert's half is the
    sample's, else 1 - pull, Z = I * Q, and the objective gets ``balance * L``, by `imbalance`:
    "cv2": L = Var(Z) / (Mean(Z)^2 + 1e-10), which does not grow with the tokens (the authors'
    code); "mean": L = Var(Z) / Mean(Z) (the paper). Var is unbiased, over batch and experts.
    Padding is left out where the model is called with ``attention_mask``.

    Start: B = 0, the pre-trained function exactly. Trains N (rank (in + out) + in) per matrix.
    Kept for backward: x once for all experts, N rank + 2 N numbers per token (the weights of the
    experts a second time where the balance rides on them; N rank + N with ``balance=0``).
    Not mergeable: the update depends on the token. No weight decay.
    Defaults are those of the authors' script but for pull and balance, which it leaves at 0: here
    the paper's 0.1. `targets` narrows it to some of the MLP's linears, or to a part of a fused one
    ("up" of gate_up).
    """

    paper: ClassVar[str] = ("LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World "
                            "Knowledge in Language Model Alignment (2023), arXiv:2312.09979")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp linears"})
    context: ClassVar[Mapping[str, Key]] = {
        "sample_type": Key("1 for world knowledge, 0 for other tasks", training=True)}
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    experts: int = setting(8, "N, experts per linear; an even number")
    rank: int = setting(4, "rank of every expert", alias=("r",))
    alpha: float = setting(32.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    pull: float = setting(0.1, "how far the halves are pulled apart", alias=("delta",))
    balance: float = setting(0.1, "weight of the balance loss", alias=("beta",))
    imbalance: Literal["cv2", "mean"] = setting("cv2", "Var / Mean^2, or Var / Mean")

    def __post_init__(self) -> None:
        check_dropout("loramoe", self.dropout)

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.balance else {}

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        if self.experts < 2 or self.experts % 2:
            raise RecipeError(f"loramoe(experts={self.experts}): the experts are two halves; "
                              "expected an even number")
        sites = [s for p in mlp_linears(anatomy) for s in (p, *anatomy.slices(p))]
        places = narrowed(anatomy, self, sites, lambda s, named: s in named)
        for place, rows, out in linears(anatomy, self, places, rank=self.rank):
            yield Branch(place.path, DenseChains(
                place.inp, out, self.experts, self.rank, scale=self.alpha / self.rank,
                dropout=self.dropout, coefficient=self.balance, pull=self.pull, kind=self.imbalance,
                rows=rows), read=(place.path, "input"))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.experts * (self.rank + (2 if self.balance else 1))

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.experts * (self.rank * (place.inp + place.out) + place.inp)
