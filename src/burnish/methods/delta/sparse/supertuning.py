from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....blocks.choose import masks
from ....blocks.weight.factor import Chain
from ....blocks.weight.sparse import SparseDelta
from ....blocks.weight.term import Term
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Support(SparseDelta):
    """The entries of a weight that were chosen by their size."""


@dataclass(frozen=True, kw_only=True)
class Supertuning(Method):
    """Super-Tuning: the largest entries of a weight train; with a rank, a LoRA beside them.

    ``W' = W + scatter(index, v)``, index the k = density in out entries of largest |W| (smallest
    with ``largest=False``), v (k,). With `rank` it is Supra: ``+ s B A``, A (rank, in), B (out,
    rank), s = alpha / rank, alpha = 2 rank unless said; `dropout` acts on the input of A. Nothing
    is read but the weight. (Of the paper's ways to score entries this is the one without data,
    which PEFT has; `shira` and `gps` score by gradients.)

    Start: v = 0, B = 0: the pre-trained function exactly. Trains k + rank (in + out) per matrix.
    Kept for backward: x, rank numbers per token beside it. The file holds the index, 4 bytes an
    entry. Merges exactly. Costs a panel of dL/dW as every sparse update does on a CPU, in out per
    token, 1.7 times LoRA's step on ViT-B/16; on CUDA the entries alone.
    """

    paper: ClassVar[str] = "Super-Tuning (2026), arXiv:2607.09287"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    density: float = setting(0.01, "share of the entries that train")
    largest: bool = setting(True, "those of largest size; False: of smallest",
                            alias=("select_top",))
    rank: int | None = setting(None, "of a LoRA beside them; None: none", alias=("r",), other=(2,))
    alpha: float | None = setting(None, "numerator of its scale; None: twice its rank",
                                  alias=("lora_alpha",), other=(9.0,), beside={"rank": 2})
    dropout: float = setting(0.0, "on its input", alias=("lora_dropout",), other=(0.5,),
                             beside={"rank": 2})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"supertuning: density={self.density}: expected a share above 0, at "
                              "most 1")
        if self.rank is None and (self.alpha is not None or self.dropout):
            raise RecipeError("supertuning: alpha and dropout are of a LoRA, which rank=... adds")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"supertuning: dropout={self.dropout}: expected a share below 1")

    def entries(self, place: Place, known: int | None = None) -> int:
        k = int(place.numel * self.density) if known is None else known
        if not 1 <= k <= place.numel:
            raise RankError(f"supertuning: {k} of the {place.numel} entries of {place.name}; a "
                            "density that chooses some of them is expected")
        return k

    def delta(self, site: Site) -> tuple[Term, ...]:
        place, known = site.place, site.settled.get("entries")
        k = self.entries(place, known)
        if site.blank:
            index = torch.arange(k)                  # a file brings it
        else:
            size = site.weight.detach().abs()
            index = masks.largest(size if self.largest else -size, k, None)
        support = Support(place, index.to(site.weight.device), portable=False, counted=True,
                          narrow=False)
        if self.rank is None:
            return (support,)
        place.check_rank(self.rank, "supertuning")
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return support, Chain(place, self.rank, alpha / self.rank, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank or 0

    def count(self, place: Place, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; entries: those that a file says."""
        return self.entries(place, entries) + (self.rank or 0) * (place.out + place.inp)
