from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.columns import Columns
from ....blocks.weight.shared import Seeded, check_stored, stored
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


class Scaled(Columns):
    """``Delta = s sum_i B_i diag(lam_i) A diag(gamma_i)``, or its transpose where out < in.

    A (rank, p), B (n, q, rank), p the shorter side and q the longer; lam (n, rank) and gamma (n, p)
    train. As one product: B as (q, n rank) times the n scaled copies of A. pairing: "paper", or
    "peft", whose B_i has column ``c = k n + i`` of all of them as its k-th.
    """

    def __init__(self, place: Place, rank: int, scale: float, shared: Any, pairing: str,
                 kept: bool):
        super().__init__()
        self.pairing = pairing
        #: what a file must say so that a load waits for the bases (engine/attach.py)
        self.counted = {"bases": True} if kept else None
        self.out, self.inp, self.scale = place.out, place.inp, scale
        self.p, self.q = sorted((place.out, place.inp))
        n = products(place, rank)
        self.__dict__["shared"] = shared               # the root owns it
        self.lam = nn.Parameter(torch.zeros(n, rank))
        self.gamma = nn.Parameter(torch.full((n, self.p), 1 / max(n, self.p)))
        self.lam.burnish_decay = self.gamma.burnish_decay = False

    def columns(self, i0: int, i1: int) -> Tensor:
        wide = self.out < self.inp                     # then columns are rows of B
        cols = slice(None) if wide else slice(i0, i1)
        A = self.lam[:, :, None] * self.shared.A[:, : self.p][:, cols] * self.gamma[:, None, cols]
        n = self.lam.shape[0]
        B = self.shared.B[:n, i0:i1] if wide else self.shared.B[:n, : self.q]
        if self.pairing == "peft":                       # rows of A in the order of those columns
            A = A.transpose(0, 1)
        made = B.transpose(0, 1).flatten(1) @ A.flatten(0, 1) * self.scale
        return made.t() if wide else made


def products(place: Place, rank: int) -> int:
    """n: how many products of rank `rank` make a matrix of full rank."""
    return -(-min(place.out, place.inp) // rank)


@dataclass(frozen=True, kw_only=True)
class Randlora(Method):
    """RandLoRA: an update of full rank, the sum of random products of low rank, scaled by vectors.

    ``W' = W + s sum_i B_i diag(lam_i) A diag(gamma_i)``, i = 1..n, n = ceil(p / rank), s = alpha /
    rank, p = min(out, in), q = max(out, in); where out < in the sum is transposed. A (rank, p),
    shared by all i, and B_i (q, rank) are drawn once from the adapter's seed for all matrices, on
    the host in fp32, and frozen: a matrix takes the first columns of A and rows of B. Trained:
    lam_i (rank,), gamma_i (p,). bases = "uniform", or +-1 with a share of zeros: "sparse" (2 in 3),
    "very sparse" (all but 1 in sqrt(p)); all with unit variance.

    Start: lam = 0, gamma = 1 / max(n, p): the pre-trained function exactly. Trains n (rank + p) per
    matrix: a *larger* rank trains fewer. Kept for backward: x; the update is made again panel by
    panel, one product of the cost of min(out, in) tokens; with dropout it is a product of its own
    with the tokens too. Files hold lam and gamma alone. Merges exactly. No weight decay. The bases
    cost about q p numbers of the largest matrix, once.

    pairing="peft" is PEFT's function: where n > 1 it pairs the columns of all B_i with the rows of
    A in another order, which depends on the matrix: ``(i, k) -> column k n + i``. bases="stored" is
    what an adapter read from its folder has: that folder's bases, in our files too.
    """

    paper: ClassVar[str] = ("RandLoRA: Full-rank parameter-efficient fine-tuning of large models "
                            "(2025), arXiv:2502.00987")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    small: ClassVar[dict[str, float]] = {"alpha": 8.0}

    rank: int = setting(32, "rank of each product; the larger, the fewer parameters", alias=("r",))
    alpha: float = setting(640.0, "numerator of the scale", alias=("randlora_alpha",))
    bases: Literal["uniform", "sparse", "very sparse", "stored"] = setting(
        "uniform", "how they are drawn, or those of a file", other=("sparse", "very sparse"))
    pairing: Literal["paper", "peft"] = setting("paper", "which column of B meets which row of A")

    dropout: float = setting(0.0, "dropout on the input", alias=("randlora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("randlora", self.dropout)
        if self.rank < 1:
            raise RecipeError(f"randlora: rank={self.rank}: expected at least 1")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor | Seeded]:
        p = max(min(a.out, a.inp) for a in places)
        q = max(max(a.out, a.inp) for a in places)
        n = max(products(a, self.rank) for a in places)
        share = {"sparse": 1 / 3, "very sparse": p**-0.5}.get(self.bases, 1.0)
        bases = {"A": Seeded((self.rank, p), True, share),
                 "B": Seeded((n, q, self.rank), True, share)}
        return stored(bases) if self.bases == "stored" else bases

    def delta(self, site: Site) -> Scaled:
        site.place.check_rank(self.rank, "randlora")
        if self.bases == "stored":
            check_stored(site, "randlora")
        term = Scaled(site.place, self.rank, self.alpha / self.rank, site.shared, self.pairing,
                      self.bases == "stored")
        term.dropout = self.dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return products(place, self.rank) * (self.rank + min(place.out, place.inp))
