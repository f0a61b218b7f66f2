from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.weight.between import Between, Diagonal
from ....core.method import Method, setting
from ....core.site import Place, Site

#: pivots below this share of the largest are no divisors: their components stay out
TINY = 1e-6


def ldu(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P L (out, m), D (m,), U (m, in)) with ``W = P L diag(D) U``, U's diagonal one; partial
    pivoting, in fp64. Where a pivot is all but nothing, D is 0 and the row of U as it is."""
    P, L, U = torch.linalg.lu(W.double())
    D = U.diagonal().clone()
    sound = D.abs() > TINY * D.abs().amax()
    U = U / torch.where(sound, D, 1.0)[:, None]
    return (P @ L).to(W), torch.where(sound, D, 0.0).to(W), U.to(W)


@dataclass(frozen=True, kw_only=True)
class Loldu(Method):
    """LoLDU: the diagonal of a weight's triangular decomposition trains, nothing else.

    ``W = P L diag(D) U`` with partial pivots (P folded into L: L (out, m), U (m, in), m =
    min(out, in)), ``W' = (W - s L_r diag(D_r) U_r) + s L_r diag(z) U_r``, s = alpha / rank, the
    first `rank` columns of L and rows of U, in the order of the pivots. Realised as ``W + s L_r
    diag(z - D_r) U_r``: the base is left alone. (The authors' other starts of z change the model at
    step 0, since their residual is built with D_r; with a residual of their own only z - z_0 would
    act, as here. They are not offered. Their scale is declared a parameter but never trained.)

    Start: z = D_r: the pre-trained function exactly. Trains rank per matrix. Kept for backward:
    x U_r^T (rank numbers per token), not x. The file holds the factors and D_r, rank (in + out + 1)
    numbers: pivots that tie fall differently elsewhere. Merges exactly. No weight decay; a large
    learning rate (1e-3 to 1e-2, unconfirmed).
    """

    paper: ClassVar[str] = ("LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for "
                            "Parameter-Efficient Fine-Tuning (2024), arXiv:2410.13618")
    tier: ClassVar[str] = "checked against the paper's numbers"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(256, "entries of the diagonal that train", alias=("r",))
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)",
                                  other=(8.0,))

    def delta(self, site: Site) -> Between:
        place = site.place
        place.check_rank(self.rank, "loldu")
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return Diagonal(place.out, place.inp, self.rank, scale).read(site, ldu)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank
