from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.path import Path
from ....blocks.weight.shared import Seeded, check_stored, stored
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


class Scaled(Path):
    """``Delta = diag(b) B[:out] diag(d) A[:, :in]``; d (rank,) and b (out,) train."""

    def __init__(self, place: Place, rank: int, start: float, shared: Any, kept: bool):
        super().__init__()
        self.out, self.inp = place.out, place.inp
        #: what a file must say so that a load waits for the bases (engine/attach.py)
        self.counted = {"bases": True} if kept else None
        self.__dict__["shared"] = shared               # the root owns it
        self.d = nn.Parameter(torch.full((rank,), start))
        self.b = nn.Parameter(torch.zeros(place.out))

    @property
    def into(self) -> Tensor:
        return self.shared.A[:, : self.inp]

    def behind(self) -> Tensor:
        return self.d.unsqueeze(1) * self.told()

    def told(self) -> Tensor:
        """``(diag(b) B)^T``, (rank, out)."""
        return self.shared.B[: self.out].t() * self.b

    def path(self, h: Tensor) -> Tensor:
        B = self.shared.B[: self.out]
        return self.b.to(h.dtype) * ((self.d.to(h.dtype) * h) @ B.t().to(h.dtype))


@dataclass(frozen=True, kw_only=True)
class Vera(Method):
    """VeRA: frozen random factors shared by all matrices, trained scaling vectors.

    ``y = x W^T + b_v * ((d * (x A^T)) B^T)``, no alpha / rank. A (rank, widest in) and
    B (widest out, rank) are drawn once from the adapter's seed, on the host in fp32, frozen,
    and shared: each matrix takes the first `in` columns of A and the first `out` rows of B.
    Trained: d (rank,), b_v (out,).

    Start: A, B uniform in +-1/sqrt(columns), d = `d_start`, b_v = 0: the pre-trained function
    exactly. Trains rank + out per matrix. Kept for backward: x A^T (rank numbers per token), not
    x. Files hold d and b_v alone: A and B are drawn again. Merges exactly:
    ``W + diag(b_v) B diag(d) A``. No weight decay. bases="stored" is what an adapter read from a
    PEFT folder has: A and B are that folder's, and in our files too. Dropout acts on the input of
    A; its mask is drawn again, never kept.

    The rank is large (256 to 1024) and so is the learning rate (ten times LoRA's). A and B cost
    rank (widest in + widest out) numbers once, and two products of that rank per matrix.
    """

    paper: ClassVar[str] = "VeRA: Vector-based Random Matrix Adaptation (2023), arXiv:2310.11454"
    tier: ClassVar[str] = "checked against the paper's numbers"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(256, "rows of the shared A", alias=("r",), least=1)
    d_start: float = setting(0.1, "start of d", alias=("d_initial",), signed=True)
    dropout: float = setting(0.0, "dropout on the input of A", alias=("vera_dropout",))
    bases: Literal["drawn", "stored"] = setting(
        "drawn", "how they are drawn, or those of a file",
        unseen="a new adapter has no file: tests/methods/test_vera.py")

    def __post_init__(self) -> None:
        check_dropout("vera", self.dropout)

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor | Seeded]:
        bases = {"A": Seeded((self.rank, max(p.inp for p in places))),
                 "B": Seeded((max(p.out for p in places), self.rank))}
        return stored(bases) if self.bases == "stored" else bases

    def delta(self, site: Site) -> Scaled:
        if self.bases == "stored":
            check_stored(site, "vera")
        term = Scaled(site.place, self.rank, self.d_start, site.shared, self.bases == "stored")
        term.dropout = self.dropout
        term.d.burnish_decay = term.b.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank + place.out
