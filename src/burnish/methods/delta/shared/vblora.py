from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.banked import Banked
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout, check_rate


@dataclass(frozen=True, kw_only=True)
class Vblora(Method):
    """VB-LoRA: factors put together of pieces that are mixtures of a bank's vectors.

    ``W' = W + B A``, A (rank, in), B (out, rank). Rows of A and columns of B are cut into pieces of
    `span` entries; a piece is ``sum_{t of the k largest l_t} softmax(l)_t bank_t``, the softmax
    over those k (k = 1 is a choice that stays as it began). The bank (vectors, span) is one for
    all matrices; a piece's logits l (vectors,) are its own, and both train. `span` divides in and
    out of every target.

    Start: the bank uniform in +-`start`, the logits N(0, std^2): step 0 is *not* the pre-trained
    function, but nearly. Trains vectors * span once and vectors * rank * (in + out) / span per
    matrix, of which an adapter that has been trained needs k indices and k - 1 weights a piece.
    Kept for backward: x, rank per token; the factors are mixed again there. Merges exactly, and
    exports as plain LoRA too. No weight decay.

    gate_rate: the logits' learning rate over the bank's, ten in the paper.
    """

    paper: ClassVar[str] = ("VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks "
                            "(2024), arXiv:2405.15179")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, Any]] = {"vectors": 12, "span": 8, "start": 0.2}

    rank: int = setting(4, "rank of the update", alias=("r",))
    vectors: int = setting(256, "of the bank", alias=("num_vectors",))
    span: int = setting(256, "entries of a vector", alias=("vector_length",), other=(4,))
    k: int = setting(2, "vectors that a piece is a mixture of", alias=("topk",), other=(3,))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("vblora_dropout",))
    start: float = setting(0.02, "bound of the bank's uniform start",
                           alias=("init_vector_bank_bound",))
    std: float = setting(0.1, "deviation of the logits at the start", alias=("init_logits_std",))
    gate_rate: float = setting(10.0, "learning rate of the logits over the bank's")

    def __post_init__(self) -> None:
        check_dropout("vblora", self.dropout)
        check_rate("vblora", self.gate_rate, "gate_rate")
        if self.rank < 1 or self.span < 1:
            raise RecipeError("vblora: rank and span of at least 1 are expected")
        if not 1 <= self.k <= self.vectors:
            raise RecipeError(f"vblora: k={self.k}: expected from 1 to vectors={self.vectors}")
        if self.start <= 0 or self.std < 0:
            raise RecipeError("vblora: start > 0 and std >= 0 are expected")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        bank = nn.Parameter(torch.empty(self.vectors, self.span).uniform_(-self.start, self.start))
        bank.burnish_decay = False                        # type: ignore[attr-defined]
        return {"bank": bank}

    def delta(self, site: Site) -> Banked:
        place, b = site.place, self.span
        place.check_rank(self.rank, "vblora")
        if place.out % b or place.inp % b:
            fits = [n for n in (2, 4, 8, 16, 32, 64, 128, 256)
                    if not (place.out % n or place.inp % n)]
            raise RecipeError(f"vblora: span={b} does not divide {place.name} ({place.out} x "
                              f"{place.inp}); {', '.join(map(str, fits)) or 'none'} would")
        term = Banked(place, self.rank, site.shared, self.vectors, b, self.k, self.std)
        term.dropout = self.dropout
        for logits in (term.a, term.b):
            logits.burnish_decay, logits.burnish_lr = False, self.gate_rate   # type: ignore
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone (the bank is the recipe's)."""
        return self.vectors * self.rank * (place.out + place.inp) // self.span
