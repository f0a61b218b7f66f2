"""Sparse updates whose entries are chosen again while they train.

    index   K positions, of which the first k train: ``values`` stands there
    held    (K - k,) what the others have learned and keep

What an optimizer remembers of an entry goes where the entry goes: one that stays keeps its moments,
one that comes has none; or all begin again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..update.resize import Moments
from .sparse import SparseDelta


class Rechosen(SparseDelta):
    """``Delta[index // in, index % in] = (values, held)``, all zero at the start.

    live: how many of the entries train; None: all. Kept for backward: x whole, wherever the entries
    are, so that another choice keeps no more.
    """

    ranked: ClassVar[dict[str, int]] = {"values": 0, "held": 0}

    def __init__(self, place: Place, index: Tensor, live: int | None = None):
        super().__init__(place, index, portable=False, narrow=False)
        self.place = place
        k = index.numel() if live is None else live
        self.values = nn.Parameter(torch.zeros(k, device=index.device))
        self.register_buffer("held", torch.zeros(index.numel() - k, device=index.device))
        self.counted = self.settled()

    def settled(self) -> dict[str, int]:
        """What a file must say so that a load makes the same shapes."""
        return {"entries": self.index.numel(), "live": self.values.numel()}

    @property
    def trained(self) -> Tensor:
        """Positions of the entries that train, (k,)."""
        return self.index[: self.values.numel()].long()

    def standing(self) -> Tensor:
        return torch.cat([self.values, self.held]) if self.held.numel() else self.values

    def entries(self) -> tuple[Tensor, Tensor]:
        index, order = self.index.long().sort()
        return index, self.standing().detach()[order]

    @torch.no_grad()
    def weights(self, W: Tensor) -> Tensor:
        """The entries of ``W + Delta`` that train, (k,), in at least fp32."""
        at = self.trained
        base = W[at // self.inp, at % self.inp]
        return base.to(torch.promote_types(base.dtype, self.values.dtype)) + self.values


@torch.no_grad()
def rechoose(term: Rechosen, resize: Callable[..., None], stay: Tensor, grown: Tensor | None = None,
             moments: Moments = "keep") -> None:
    """Between two steps: of the entries that train, those of the mask `stay` go on.

    grown: positions that come in the place of the others, as many, at zero; None: nothing comes,
    and the others are held at what they have learned. resize: as ``Tuned.resize``, which takes
    gradients, moments and the file along; moments: "drop": those of all begin again.
    """
    k = term.values.numel()
    left, gone = stay.nonzero().squeeze(1), (~stay).nonzero().squeeze(1)
    index, values = term.index.clone(), term.values.detach()
    if grown is None:
        fresh = {"held": values[gone]}
        behind = torch.cat([index[k:], index[:k][gone]])
    else:
        fresh = {"values": values.new_zeros(gone.numel())}
        behind = torch.cat([grown.to(index), index[k:]])
    resize(term, keep={"values": left}, fresh=fresh, moments=moments)
    term.index.copy_(torch.cat([index[:k][left], behind]))
