from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from ....blocks.weight.factor import Chain
from ....blocks.weight.scaled import Scaled
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """LoRA: a frozen weight plus a product of two thin factors.

    ``y = x W^T + b + s drop(x) A^T B^T`` with A (rank, in), B (out, rank), s = alpha / rank, or
    alpha / sqrt(rank) with ``scaling="rs"`` (rsLoRA: the size of the update does not shrink as the
    rank grows). Convolutions see W as (out, in * kernel); embeddings look up columns of A.

    Start: A uniform in +-1/sqrt(in), or with ``init="normal"`` of deviation 1/rank, B = 0
    (embeddings: A = 0, B normal): the pre-trained function exactly. Trains rank (in + out) per
    matrix, rank out with ``train_a=False`` (LoRA-FA). Kept for backward: x (once for all layers
    that read it) and rank numbers per token; with train_a=False only those. With dropout the mask
    is drawn again, never kept; beside a convolution the two factors run on its input then. Refused
    on what is read as a weight or looked up (attention of torch, experts, embeddings), which has
    no input to drop.
    Merges exactly: ``W + s B A``.

    With ``train_scale=True`` s is multiplied by one number a matrix that trains from 1 on, without
    weight decay (LAE, which so lets updates learn as fast as other modules): one more trained, and
    nothing kept but x, since backward runs the chain again. Not for embeddings and experts, nor
    beside train_a=False.

    ``b_rate`` multiplies the learning rate of B (LoRA+; the paper suggests 16), `embedding_rate`
    that of the factors of embeddings instead (the authors give those 1e-6). (Their code gives B's
    rate to every tensor of one dimension that trains besides, biases and norms; here those keep
    their own.) No weight decay on the factors. Factors are fp32 whatever the base.

    Example: ``lora(rank=16, alpha=32, targets="q,v")``.
    """

    paper: ClassVar[str] = ("LoRA (2021), arXiv:2106.09685; rsLoRA (2023), arXiv:2312.03732; "
                            "LoRA+ (2024), arXiv:2402.12354; LoRA-FA (2023), arXiv:2308.03303; "
                            "LAE (2023), arXiv:2303.10070")
    tier: ClassVar[str] = "checked against the paper's numbers"

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    scaling: Literal["lora", "rs"] = setting("lora", "s = alpha/rank, or alpha/sqrt(rank)")
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    train_a: bool = setting(True, "False freezes A (LoRA-FA): x is not kept")
    init: Literal["uniform", "normal"] = setting(
        "uniform", "start of A: within 1/sqrt(in), or of deviation 1/rank")
    train_scale: bool = setting(False, "s trains too")
    b_rate: float = setting(1.0, "learning rate of B relative to A (LoRA+)")
    embedding_rate: float = setting(
        1.0, "learning rate of both factors of embeddings relative to the others",
        unseen="default targets hold no embedding: tests/methods/test_lora.py")

    def __post_init__(self) -> None:
        check_dropout("lora", self.dropout)
        check_rate("lora", self.b_rate)
        check_rate("lora", self.embedding_rate, "embedding_rate")
        if self.train_scale and not self.train_a:
            raise RecipeError("lora: a scale that trains reads the whole input, which "
                              "train_a=False does not keep: leave one of them out")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rs" else self.rank)

    def delta(self, site: Site) -> Chain | Scaled:
        site.place.check_rank(self.rank, "lora")
        term = self._scaled(site.place) if self.train_scale else \
            Chain(site.place, self.rank, self.scale, self.dropout, self.train_a)
        if self.init == "normal" and site.place.kind != "embedding":
            nn.init.normal_(term.A, std=1 / self.rank)
        term.A.burnish_decay = term.B.burnish_decay = False
        term.B.burnish_lr = self.b_rate
        if site.place.kind == "embedding":
            term.A.burnish_lr = self.embedding_rate
            term.B.burnish_lr = self.embedding_rate
        return term

    def _scaled(self, place: Place) -> Scaled:
        if place.kind == "embedding" or place.experts:
            raise RecipeError(f"lora(train_scale=True): {place.name} is "
                              f"{'a table' if place.kind == 'embedding' else 'of experts'}, whose "
                              "scale is fixed; name other targets")
        return Scaled(place.out, place.inp, self.rank, self.scale, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        per = self.rank * (place.out + (place.inp if self.train_a else 0))
        return per * max(1, place.experts) + self.train_scale


def check_dropout(name: str, p: float, word: str = "dropout") -> None:
    """A probability below one."""
    if not 0 <= p < 1:
        raise RecipeError(f"{name}: {word} is a probability in [0, 1), got {p}")


def check_rate(name: str, rate: float, setting: str = "b_rate") -> None:
    """A factor of a learning rate."""
    if not 0 < rate < math.inf:
        raise RecipeError(f"{name}: {setting} multiplies a learning rate, {rate} is no rate; 1.0 "
                          "leaves it as it is, LoRA+ suggests 16 for b_rate")
