from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....blocks.choose.observe import Principal
from ....blocks.weight.factor import Chain
from ....blocks.weight.start import begin
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


def allot(explained: Mapping[Place, torch.Tensor], budget: int) -> dict[Place, int]:
    """Ranks: the `budget` components with the largest share of variance, wherever they are.

    Of equal shares the lower component goes first, then the earlier place.
    """
    ranked = sorted((-float(v), j, n, p) for n, (p, shares) in enumerate(explained.items())
                    for j, v in enumerate(shares))
    out = dict.fromkeys(explained, 0)
    for _, _, _, place in ranked[:budget]:
        out[place] += 1
    return out


@dataclass(frozen=True, kw_only=True)
class Eva(Method):
    """EVA: LoRA whose A starts at the principal directions of the inputs, with ranks to match.

    Incremental PCA of each linear's inputs gives directions V (k, in), k = rho rank, and shares of
    variance ``xi_j = S_j^2 / (N sum_d var_d)``. The rank budget R = rank x matrices goes to the R
    largest xi over all matrices: ``A = V[:r_l]``, ``B = 0``,
    ``y = x W^T + b + s (x A^T) B^T``, s = alpha / rank for every matrix. A matrix that gets
    nothing is left alone. ``whiten`` divides the rows of A by sqrt(S).

    Reads data first: ``tune(..., calibration=batches)``. Only tokens that are attended to and
    learnt from count. A direction has converged when one more batch turns it by less than
    cos = `tolerance`; reading stops when all directions in use have, or the data end. Matrices
    with the same input share one PCA of k (in + 2) numbers; no (in, in) matrix is made.

    Start: B = 0, the pre-trained function exactly. Trains sum of r_l (in_l + out_l): the same
    budget of ranks as LoRA, not the same count. Kept for backward and merging as LoRA. The file
    holds A and the ranks, so a load needs no data. Without data (a simulation) every r_l = rank. No
    weight decay.
    """

    paper: ClassVar[str] = ("One Initialization to Rule them All: Fine-tuning via Explained "
                            "Variance Adaptation (2024), arXiv:2410.07170")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    excused: ClassVar[Mapping[str, str]] = {
        "simulated_is_measured on mlp": "without data every matrix has the mean rank, and ranks of "
                                        "unlike matrices weigh unlike"}

    rank: int = setting(16, "mean rank: the budget is rank x matrices", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    rho: float = setting(2.0, "a matrix gets at most rho x rank; 1 gives all the same")
    tolerance: float = setting(0.99, "cosine at which a direction counts as converged",
                               other=(-1.0,), signed=True)
    whiten: bool = setting(False, "divide the rows of A by sqrt(S)")
    samples: int | None = setting(None, "samples to read at most; None: all there are",
                                  other=(1,), least=1)

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise RecipeError(f"eva: rho is at least 1 (no redistribution), got {self.rho}")

    def observe(self, place: Place) -> Principal:
        place.check_rank(self.rank, "eva")
        return Principal(place.inp, round(self.rho * self.rank), self.tolerance)

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        shares = {p: s.explained[: min(p.out, p.inp)] for p, s in seen.items()}
        ranks = allot(shares, self.rank * len(seen))
        for statistic in seen.values():
            statistic.needed = torch.tensor(0)
        for place, rank in ranks.items():              # places that share: the larger rank
            seen[place].needed = seen[place].needed.clamp(min=rank)
        return {p: {"rank": r} for p, r in ranks.items()}

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, None]:
        rows = seen.V[:rank]
        return rows / seen.S[:rank].sqrt().unsqueeze(1) if self.whiten else rows, None

    def delta(self, site: Site) -> Chain | None:
        site.place.check_rank(self.rank, "eva")
        rank = site.settled.get("rank", self.rank)
        return begin(Chain(site.place, rank, self.alpha / self.rank), site, self.start) \
            if rank else None

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers kept per token besides the input (with dropout 0)."""
        return self.rank if rank is None else rank

    def count(self, place: Place, rank: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank (default: the mean)."""
        return (self.rank if rank is None else rank) * (place.out + place.inp)
