from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.shared import Seeded, check_stored, stored
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout
from .vera import Scaled


class Sampled(Scaled):
    """``y += b * (z B[:out]^T)``, ``(m, l) = d * (x A[:, :in]^T)``, both (rank,); z is drawn from
    N(m, exp(l)) in training and m otherwise. d (2 rank,) and b (out,) train."""

    def __init__(self, place: Place, rank: int, start: float, shared: Any, kept: bool):
        super().__init__(place, rank, start, shared, kept)
        self.d = nn.Parameter(torch.full((2 * rank,), start))

    @property
    def draws(self) -> bool:
        return self.training

    def path(self, h: Tensor) -> Tensor:
        z, spread = (self.d.to(h.dtype) * h).chunk(2, -1)
        if self.training:
            z = z + torch.randn_like(z) * (0.5 * spread).exp()
        return self.b.to(h.dtype) * (z @ self.shared.B[: self.out].t().to(h.dtype))

    def behind(self) -> Tensor:                  # without noise: of half of `into` nothing is read
        d, told = self.d[: len(self.d) // 2], self.told()
        return torch.cat([d.unsqueeze(1) * told, torch.zeros_like(told)])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        d = self.d[: len(self.d) // 2]
        return d[:, None] * self.into[: len(d)], self.b[:, None] * self.shared.B[: self.out]


@dataclass(frozen=True, kw_only=True)
class Pvera(Method):
    """PVeRA: VeRA whose hidden numbers are drawn, from a distribution that the token tells.

    ``m = d_1 * (A_1 x)``, ``l = d_2 * (A_2 x)``, ``W' x = W x + b_v * (B z)``, z from
    ``N(m, diag(exp(l)))`` in training, drawn anew for every token, and z = m afterwards: then it is
    VeRA. A = [A_1; A_2] (2 rank, widest in) and B (widest out, rank) are drawn once from the
    adapter's seed, frozen and shared: each matrix takes the first `in` columns of A and the first
    `out` rows of B. Trained: d = (d_1, d_2) (2 rank,), b_v (out,).

    Start: A, B uniform in +-1/sqrt(columns), d = `d_start`, b_v = 0: the pre-trained function
    exactly. Trains 2 rank + out per matrix. Kept for backward: A x (2 rank numbers per token), not
    x; the noise is drawn again. Files hold d and b_v alone: A and B are drawn again.
    bases="stored" is what an adapter read from a PEFT folder has: A and B are that folder's, and in
    our files too. Merges exactly, as what answers after training. No weight decay. No prior pulls
    the distribution anywhere, in the paper's code and PEFT's neither.
    """

    paper: ClassVar[str] = ("PVeRA: Probabilistic Vector-Based Random Matrix Adaptation (2025), "
                            "arXiv:2512.07703")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "loss_falls": "by chance: noise as large as one hides a few steps; "
                      "tests/methods/test_pvera.py learns"}
    exact: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(256, "numbers that are drawn", alias=("r",))
    d_start: float = setting(0.1, "start of d", alias=("d_initial",), signed=True)
    dropout: float = setting(0.0, "dropout on the input of A", alias=("pvera_dropout",))
    bases: Literal["drawn", "stored"] = setting(
        "drawn", "how they are drawn, or those of a file",
        unseen="a new adapter has no file: tests/methods/test_pvera.py")

    def __post_init__(self) -> None:
        check_dropout("pvera", self.dropout)
        if self.rank < 1:
            raise RecipeError(f"pvera: rank={self.rank}: expected at least 1")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor | Seeded]:
        bases = {"A": Seeded((2 * self.rank, max(p.inp for p in places))),
                 "B": Seeded((max(p.out for p in places), self.rank))}
        return stored(bases) if self.bases == "stored" else bases

    def delta(self, site: Site) -> Sampled:
        if self.bases == "stored":
            check_stored(site, "pvera")
        term = Sampled(site.place, self.rank, self.d_start, site.shared, self.bases == "stored")
        term.dropout = self.dropout
        term.d.burnish_decay = term.b.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return 2 * self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 2 * self.rank + place.out
