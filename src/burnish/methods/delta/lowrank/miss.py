from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....blocks.weight.provided import Term
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Shards(Term):
    """``y += (sum_g x[g r : (g+1) r]) D``: a LoRA whose A is the tiled identity.

    D: (rank, out), or (rank, mini) repeated along out. Backward keeps rank numbers per token.
    """

    tokenwise: ClassVar[bool] = True
    cheap_tile: ClassVar[bool] = True

    def __init__(self, place: Place, rank: int, width: int):
        super().__init__()
        self.D = nn.Parameter(torch.zeros(rank, width))
        self.rank, self.inp, self.repeat = rank, place.inp, place.out // width

    keeps_input = False

    def _fold(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -self.inp % self.rank))
        return x.view(x.shape[0], -1, self.rank).sum(1)

    def _matrix(self) -> Tensor:
        return self.D.repeat(1, self.repeat)

    def dense(self) -> Tensor:
        shards = -(-self.inp // self.rank)
        return self._matrix().t().repeat(1, shards)[:, : self.inp]

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        h_NR = self._fold(x_NI)
        y_NO.addmm_(h_NR.to(y_NO.dtype), self._matrix().to(y_NO.dtype), alpha=scale)
        return (h_NR,)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        (h_NR,) = kept
        dD = (h_NR.t() @ g_NO).mul_(scale)
        if self.repeat > 1:
            dD = dD.view(self.rank, self.repeat, -1).sum(1)
        if dx_NI is not None:
            back = (g_NO @ self._matrix().t().to(g_NO.dtype)).mul_(scale)
            whole = self.inp // self.rank * self.rank
            dx_NI[:, :whole].view(-1, whole // self.rank, self.rank).add_(back.unsqueeze(1)) \
                if whole == self.inp else self._add_padded(dx_NI, back)
        return [dD.to(self.D.dtype)]

    def _add_padded(self, dx_NI: Tensor, back: Tensor) -> None:
        for i0 in range(0, self.inp, self.rank):
            n = min(self.rank, self.inp - i0)
            dx_NI[:, i0 : i0 + n].add_(back[:, :n])

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        index = torch.arange(i0, i1, device=self.D.device) % self.rank
        return self._matrix().t()[:, index]


@dataclass(frozen=True, kw_only=True)
class Miss(Method):
    """MiSS: matrix shard sharing, the cheapest low-rank update (first published as Bone, DiSHA).

    The input is cut into runs of `rank` and the runs are summed (zero-padded at the end):
    ``y = x W^T + (sum_g x_g) D`` with D (rank, out); so ``Delta = D^T [I I ... I]``, a LoRA with a
    fixed tiled-identity A and no scale. ``mini`` makes D (rank, mini), repeated out / mini times.

    Start: D = 0: the pre-trained function exactly. Trains rank out (mini: rank mini) per matrix.
    Kept for backward: rank numbers per token; the layer's input is not needed. Merges exactly.
    """

    paper: ClassVar[str] = "MiSS / DiSHA / Bone (2024), arXiv:2409.15371"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(64, "length of a shard", alias=("r",))
    mini: int = setting(0, "width of D when it is repeated along out; 0: not repeated")

    def delta(self, site: Site) -> Shards:
        place = site.place
        place.check_rank(self.rank, "miss")
        if self.mini < 0 or self.mini and place.out % self.mini:
            raise RecipeError(f"miss: mini={self.mini} does not divide the {place.out} outputs of "
                              f"{place.name}")
        term = Shards(place, self.rank, self.mini or place.out)
        term.D.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (self.mini or place.out)
