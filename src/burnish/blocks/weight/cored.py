"""A square core between a frozen down-projection and an up-projection that freezes by and by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.site import Place
from .path import Path


class Cored(Path):
    """``Delta = s ([F B] C - B0 C0) A``: A (r, in) and F (out, f) frozen, B (out, r - f), C (r, r).

    start: B0 (out, r), C0 (r, r) leave the base; without one they are not there.
    """

    ranked: ClassVar[dict[str, int]] = {"B": 1, "F": 1}

    def __init__(self, place: Place, rank: int, scale: float, frozen: int, start: bool):
        super().__init__()
        self.inp, self.scale, bound = place.inp, scale, rank**-0.5
        self.C = nn.Parameter(torch.empty(rank, rank).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(place.out, rank - frozen))
        self.C.burnish_decay = self.B.burnish_decay = False
        side = place.inp**-0.5
        self.register_buffer("A", torch.empty(rank, place.inp).uniform_(-side, side))
        self.register_buffer("F", torch.zeros(place.out, frozen))
        if start:
            self.register_buffer("B0", torch.zeros(place.out, rank))
            self.register_buffer("C0", torch.zeros(rank, rank))

    @property
    def into(self) -> Tensor:
        return self.A

    @property
    def frozen(self) -> int:
        """Columns that train no more."""
        return self.F.shape[1]

    def settled(self) -> dict[str, int]:
        return {"rank": len(self.C), "frozen": self.frozen}

    @torch.no_grad()
    def begin(self, U: Tensor, S: Tensor, Vt: Tensor) -> None:
        for there, value in ((self.A, Vt), (self.B, U), (self.B0, U), (self.C, torch.diag(S)),
                             (self.C0, torch.diag(S))):
            there.copy_(value)

    def sides(self) -> tuple[Tensor, Tensor]:
        """(r, r) and (out, r); with no column left to train, B is in the first, at no cost."""
        if self.B.shape[1]:
            return self.C, torch.cat([self.F, self.B], 1)
        return self.C + self.B.sum(), self.F

    def path(self, h: Tensor) -> Tensor:
        (C, U), B0 = self.sides(), getattr(self, "B0", None)
        if B0 is None:
            return h @ C.t().to(h.dtype) @ U.t().to(h.dtype) * self.scale
        first = h @ C.t().to(h.dtype) @ (U - B0).t().to(h.dtype)
        return (first + h @ (C - self.C0).t().to(h.dtype) @ B0.t().to(h.dtype)) * self.scale

    def pair(self) -> tuple[Tensor, Tensor]:
        (C, U), B0 = self.sides(), getattr(self, "B0", None)
        made = U @ C if B0 is None else (U - B0) @ C + B0 @ (C - self.C0)
        return self.A, made * self.scale


class Freezing:
    """After t updates the first ``floor(r min(1, t / t_i))`` columns of every B are frozen."""

    def __init__(self, terms: Mapping[str, Cored], resize: Any, share: float):
        self.terms, self.resize, self.share = terms, resize, share
        self.last: int | None = None

    def start(self, total: int | None) -> None:
        self.last = None if total is None else max(1, round(self.share * total))

    def after_update(self, step: int) -> None:
        if self.last is None:
            return
        for term in self.terms.values():
            now = len(term.C) * min(step + 1, self.last) // self.last - term.frozen
            if now > 0:
                self.resize(term, keep={"B": torch.arange(now, term.B.shape[1])},
                            fresh={"F": term.B.detach()[:, :now]})

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"]
