"""An update that reads its input in shards: runs of the input are summed, then multiplied once."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from ..linalg import over_tokens
from ..tape.replay import Mask
from .provided import Term


class Shards(Term):
    """``y += (sum_g x[g r : (g+1) r]) D``: a LoRA whose A is the tiled identity.

    D: (rank, out), or (rank, mini) repeated along out. Backward keeps rank numbers per token.
    dropout acts on x before it is summed; the mask is drawn again in backward.
    """

    tokenwise: ClassVar[bool] = True
    cheap_tile: ClassVar[bool] = True

    def __init__(self, place: Place, rank: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.D = nn.Parameter(torch.zeros(rank, width))
        self.rank, self.inp, self.repeat = rank, place.inp, place.out // width

    keeps_input = False

    def _fold(self, x: Tensor) -> Tensor:
        if short := -self.inp % self.rank:       # (a pad of nothing copies)
            x = F.pad(x, (0, short))
        return x.view(x.shape[0], -1, self.rank).sum(1)

    def _matrix(self) -> Tensor:
        return self.D if self.repeat == 1 else self.D.repeat(1, self.repeat)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank), whose product is the update."""
        eye = torch.eye(self.rank, dtype=self.D.dtype, device=self.D.device)
        return eye[:, torch.arange(self.inp, device=eye.device) % self.rank], self._matrix().t()

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.factors()

    def dense(self) -> Tensor:
        return self.tile(0, self.inp, None)

    def plain(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        h = self._fold(F.dropout(x, p, p > 0).reshape(-1, self.inp))
        return (h @ self._matrix().to(h.dtype)).view(*x.shape[:-1], -1)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        mask = None
        if self.dropout and self.training:
            mask = Mask(x_NI, self.dropout)
            x_NI = mask.first(x_NI)
        h_NR = self._fold(x_NI)
        y_NO.addmm_(h_NR.to(y_NO.dtype), self._matrix().to(y_NO.dtype), alpha=scale)
        return (h_NR, mask)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        h_NR, mask = kept
        dD = over_tokens(g_NO, h_NR).t()
        dD = dD if scale == 1 else dD.mul_(scale)
        if self.repeat > 1:
            dD = dD.view(self.rank, self.repeat, -1).sum(1)
        if dx_NI is not None:
            back = (g_NO @ self._matrix().t().to(g_NO.dtype)).mul_(scale)
            if mask is None:
                self._spread(dx_NI, back)
            else:                               # dropout is linear: the same mask on the gradient
                whole = self._spread(torch.zeros_like(dx_NI), back)
                dx_NI.add_(mask(whole))
        return [dD.to(self.D.dtype)]

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[object, ...], scale: float
              ) -> Tensor | None:
        h_NR, _ = kept
        return (over_tokens(g_NO, h_NR) * self._matrix().t()).sum(-1).mul_(scale)

    def _spread(self, dx_NI: Tensor, back: Tensor) -> Tensor:
        """Every shard of an input takes the same part; the last may be cut short."""
        whole = self.inp // self.rank * self.rank
        dx_NI[:, :whole].unflatten(1, (-1, self.rank)).add_(back.unsqueeze(1))
        dx_NI[:, whole:].add_(back[:, : self.inp - whole])
        return dx_NI

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        index = torch.arange(i0, i1, device=self.D.device) % self.rank
        return self._matrix().t()[:, index]
