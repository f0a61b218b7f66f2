from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.linalg import svd
from ....blocks.weight.between import Between, Diagonal
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Svfit(Method):
    """SVFit: the largest singular values of a weight train, its singular vectors stay.

    ``W = U S V^T``, ``W' = W + U_r diag(sigma - sigma_0) V_r^T``, U_r (out, rank), V_r (in, rank),
    sigma (rank,) from sigma_0 = S_r: what trains moves along directions that W has. (The paper
    writes U_r diag(sigma) V_r^T + residual, which is the same; this form leaves the base alone.)

    Start: sigma = sigma_0: the pre-trained function exactly. Trains rank per matrix; about as many
    as there are keep 99 % of the energy. Kept for backward: x V_r (rank numbers per token), not x.
    The file holds U_r, V_r and sigma_0 too, rank (in + out) numbers: singular vectors differ
    between machines. Merges exactly. No weight decay; a large learning rate (1e-3 to 1e-2).
    """

    paper: ClassVar[str] = ("SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models "
                            "Using Singular Values (2024)")
    tier: ClassVar[str] = "checked against the paper's numbers"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(256, "leading singular values that train", alias=("r",))

    def delta(self, site: Site) -> Between:
        place = site.place
        place.check_rank(self.rank, "svfit")
        term = Diagonal(place.out, place.inp, self.rank, 1.0)
        return term.read(site, lambda W: svd(W, self.rank))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank
