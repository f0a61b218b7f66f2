from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....blocks.weight.lower import Lower
from ....blocks.weight.start import decomposed
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Osf(Method):
    """OSF: the lesser singular triplets of W train, and never towards the leading ones.

    ``W = U S V^T`` with m = min(out, in) triplets; the k leading ones hold what the model knows and
    stay, ``W' = U_k S_k V_k^T + P diag(E) Q``: P (out, m - k), E (m - k,), Q (m - k, in). Of their
    gradients what lies in the leading directions is taken out: ``dP - U_k U_k^T dP`` and
    ``dQ - dQ V_k V_k^T``, in backward, so a plain step keeps the tasks apart; a rule that
    scales entry by entry (Adam) does so nearly. Realised as an update on W, which is never written.

    k is `kept`: a share of m below one, or from 1 on how many. (The paper gives each layer a share
    of its own by how alike the layer's inputs and outputs are, as data show; PEFT takes one number,
    or patterns of them, which is followed: several parts with targets of their own say the rest.)

    Start: the last m - k triplets, the pre-trained function exactly. Trains (m - k) (out + in + 1)
    per matrix: with half of them kept as many as full fine-tuning of a square one. Kept for
    backward: x; the update is made again there. Costs dL/dW as full fine-tuning does, n in out for
    n tokens, and 6 (m - k) in out a step, beside an optimizer of W-sized state, where LoRA has none
    of the three: 3.0 times its step on ViT-B/16 with 1576 tokens (PEFT's: 5.0). The file holds the
    start too. Merges exactly. No weight decay, which would pull triplets of W to nothing.
    """

    paper: ClassVar[str] = ("Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for "
                            "Continual Learning (2025), arXiv:2504.07097")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    kept: int | float = setting(0.5, "leading triplets that stay: a share below 1, or how many",
                                alias=("effective_rank",), other=(8,))

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1 and not (isinstance(self.kept, int) and self.kept >= 1):
            raise RecipeError(f"osf: kept={self.kept}: expected a share between 0 and 1, or a "
                              "whole number from 1")

    def rank(self, place: Place) -> int:
        """Triplets of a matrix that train."""
        m = min(place.out, place.inp)
        k = self.kept if isinstance(self.kept, int) else max(1, int(m * self.kept))
        if k >= m:
            raise RankError(f"osf: kept={self.kept} of the {m} triplets of {place.name} leaves "
                            "none that trains")
        return m - k

    def delta(self, site: Site) -> Lower:
        term = Lower(site.place, self.rank(site.place)).to(site.weight.device)
        if not site.blank:
            term.begin(*decomposed(site, lambda W: torch.linalg.svd(W, full_matrices=False)))
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank(place) * (place.out + place.inp + 1)
