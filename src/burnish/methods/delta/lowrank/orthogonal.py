from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.weight.factor import Chain
from ....core.draw import drawn
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


def columns(inp: int, first: int, last: int, seed: int) -> Tensor:
    """Rows first:last, (last - first, in), of an orthogonal matrix that depends on (inp, seed)
    alone: those of a Gaussian's QR, whose leading columns need no others. In fp64, signs fixed."""
    with drawn(seed):                            # row by row: more of them change none before
        G = torch.stack([torch.randn(inp, dtype=torch.float64) for _ in range(last)], 1)
    Q, R = torch.linalg.qr(G)
    return (Q * R.diagonal().sign())[:, first:].t().float()


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Method):
    """Orthogonal Adaptation: down-projections fixed at right angles, so that concepts add up.

    ``W'_i = W + s B_i A_i``, A_i (rank, in) frozen, rows rank i .. rank (i + 1) of one orthogonal
    matrix per input width that every user draws from the same `seed`; B_i (out, rank) trains, s =
    alpha / rank. For two concepts ``A_i A_j^T = 0``: inputs in the span of A_i see Delta_i alone,
    and ``<Delta_i, Delta_j> = 0``, so ``W + sum_i c_i Delta_i`` serves all of them with no further
    training and no exchange of data. Number your concepts (`concept`) apart; in / rank of them
    have room, more are refused.

    Start: B = 0: the pre-trained function exactly. Trains rank out per matrix. Kept for backward:
    rank numbers per token, not x. Merges exactly. The file holds A. No weight decay.
    """

    paper: ClassVar[str] = ("Orthogonal Adaptation for Modular Customization of Diffusion Models "
                            "(2023), arXiv:2312.02432")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(20, "rank of a concept", alias=("r",))
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)",
                                  other=(8.0,))
    concept: int = setting(0, "which rows are this concept's: no two share a number")
    seed: int = setting(0, "of the orthogonal matrix: the same for all who will be merged")

    def __post_init__(self) -> None:
        if self.concept < 0:
            raise RecipeError(f"orthogonal: concept={self.concept}: concepts are numbered from 0")

    def delta(self, site: Site) -> Chain:
        place, first = site.place, self.rank * self.concept
        place.check_rank(self.rank, "orthogonal")
        if first + self.rank > place.inp:
            raise RecipeError(f"orthogonal: concept {self.concept} of rank {self.rank} has no room "
                              f"in the {place.inp} inputs of {place.name}; the last one there is "
                              f"{place.inp // self.rank - 1}")
        term = Chain(place, self.rank, 1.0 if self.alpha is None else self.alpha / self.rank,
                     train_a=False)
        term.A.burnish_decay = term.B.burnish_decay = False
        if not site.blank:
            term.A.data.copy_(columns(place.inp, first, first + self.rank, self.seed))
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * place.out
