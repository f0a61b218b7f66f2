from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....blocks.weight.path import Path
from ....core.errors import RecipeError, TargetError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Tiles(Path):
    """``Delta[tile a, b] = s V Sigma_ab U^T`` for the (out/d) x (in/d) tiles of a matrix.

    Sigma (rows, columns, rank, rank) is this matrix's own ("tt"), or ``sum_j P_abj C_j`` with P
    (rows, columns, rank) its own and C (rank, rank, rank) shared ("tk").
    """

    def __init__(self, place: Place, d: int, rank: int, scale: float, dropout: float, tk: bool,
                 shared: Any):
        super().__init__()
        self.inp, self.d, self.rank = place.inp, d, rank
        self.rows, self.columns = place.out // d, place.inp // d
        self.scale, self.dropout = scale, dropout
        self.__dict__["shared"] = shared               # the root owns it
        if tk:
            self.P = nn.Parameter(torch.empty(self.rows, self.columns, rank))
            nn.init.uniform_(self.P, -math.sqrt(3 / rank), math.sqrt(3 / rank))
        else:
            self.sigma = nn.Parameter(torch.empty(self.rows, self.columns, rank, rank))
            nn.init.uniform_(self.sigma, -1 / math.sqrt(rank), 1 / math.sqrt(rank))

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return tuple(self.shared.parameters())

    own_drops = True

    @property
    def draws(self) -> bool:
        return bool(self.dropout and self.training)

    def core(self) -> Tensor:
        """Sigma: (rows, columns, rank, rank)."""
        if hasattr(self, "sigma"):
            return self.sigma
        return torch.einsum("abj,rtj->abrt", self.P, self.shared.C)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Of rank min(rows, columns) rank: U or V once for each tile along the shorter side."""
        U, V, sigma = self.shared.U, self.shared.V, self.core()
        if self.columns <= self.rows:
            B = torch.einsum("dr,abrt->adbt", V, sigma).flatten(2).flatten(0, 1)
            return torch.block_diag(*[U.t()] * self.columns), B * self.scale
        A = torch.einsum("et,abrt->arbe", U, sigma).flatten(2).flatten(0, 1)
        return A, torch.block_diag(*[V] * self.rows) * self.scale

    def path(self, h: Tensor) -> Tensor:
        U, V, sigma = self.shared.U.to(h.dtype), self.shared.V.to(h.dtype), self.core()
        u = h.unflatten(-1, (self.columns, self.d)) @ U                # (N, columns, rank)
        t = torch.einsum("nbt,abrt->nar", u, sigma.to(h.dtype))
        return (F.dropout(t, self.dropout, self.draws) @ V.t()).flatten(-2) * self.scale


@dataclass(frozen=True, kw_only=True)
class Fact(Method):
    """FacT: all weight increments of the model as one tensor, decomposed.

    Every matrix is cut into d x d tiles (d: the model's width; the two matrices of an MLP are
    four tiles each), and tile i gets ``Delta_i = s V Sigma_i U^T`` with U, V (d, rank) shared by
    all. ``form="tt"`` (tensor train): Sigma_i (rank, rank) is the tile's own. ``form="tk"``
    (Tucker): ``Sigma_i = sum_j P_ij C_j`` with a shared core C (rank, rank, rank) and P (tiles,
    rank). ``y = x W^T + b + s drop(Sigma U^T x) V^T``.

    Start: V = 0, the rest drawn: the pre-trained function exactly. Trains 2 d rank +
    tiles rank^2 ("tt") or 2 d rank + rank^3 + tiles rank ("tk"); on ViT-B that is 61,440 with
    "tt" at rank 16, 86,528 with "tk" at rank 32. Kept for backward: x. Merges exactly.
    The authors tune s in {0.01, 0.1, 1, 10, 100}, drop with 0.1 in training, and take rank 16
    ("tt") and 32 ("tk") at most. A weight whose sides are no multiples of d is refused.
    """

    paper: ClassVar[str] = ("FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer "
                            "(2023), arXiv:2212.03145")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    needs: ClassVar[frozenset[str]] = frozenset({"tiles"})

    rank: int = setting(16, "columns of U and V", alias=("r",))
    form: Literal["tt", "tk"] = setting("tt", "tensor train, or Tucker with a shared core")
    scale: float = setting(1.0, "s")
    dropout: float = setting(0.0, "dropout between Sigma and V")

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"fact: dropout is a probability in [0, 1), got {self.dropout}")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        fit = [p for p in places if self.rank <= min(p.out, p.inp)]      # of others `delta` says so
        if not fit:
            places[0].check_rank(self.rank, "fact")
        d = min(min(p.out, p.inp) for p in fit)
        for p in fit:
            if p.out % d or p.inp % d:
                raise TargetError(f"fact cuts weights into {d} x {d} tiles (the smallest side "
                                  f"among its targets); {p.name} ({p.out} x {p.inp}) has no whole "
                                  "number of them: leave it out of targets")
        U = nn.Parameter(torch.empty(d, self.rank))
        nn.init.uniform_(U, -1 / math.sqrt(d), 1 / math.sqrt(d))
        out = {"U": U, "V": nn.Parameter(torch.zeros(d, self.rank))}
        if self.form == "tk":
            out["C"] = nn.Parameter(nn.init.xavier_uniform_(torch.empty((self.rank,) * 3)))
        return out

    def delta(self, site: Site) -> Tiles:
        site.place.check_rank(self.rank, "fact")
        return Tiles(site.place, site.shared.U.shape[0], self.rank, self.scale, self.dropout,
                     self.form == "tk", site.shared)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place, shared: Any) -> int:
        """Trainable parameters of one matrix alone (U, V and C are the recipe's)."""
        d = shared.U.shape[0]
        own = self.rank**2 if self.form == "tt" else self.rank
        return (place.out // d) * (place.inp // d) * own
