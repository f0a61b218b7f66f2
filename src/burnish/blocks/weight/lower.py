"""The lesser singular triplets of a weight as what trains, at right angles to the leading ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from .term import Term


class Lower(Term):
    """``Delta = P diag(E) Q - P0 diag(E0) Q0``: P (out, r), E (r,), Q (r, in) train from the last r
    of the m = min(out, in) singular triplets.

    With C = P diag(E) it is made as ``(C - C0) Q + C0 (Q - Q0)``, exactly nothing at the start.
    Gradients of P and Q are those of the loss less what lies in the leading k = m - r directions:
    ``dP - U_k U_k^T dP``, ``dQ - dQ V_k V_k^T``. Of the shorter side these are ``P0 P0^T dP``, as
    its vectors span the whole space; of the longer one `high` (its length, k) has the leading ones.
    The start and `high` are buffers, in the file.

    r is about half of m, so the update is made as a matrix, panel by panel: r out in, where tokens
    would cost n r (out + in).
    """

    tiled = True

    def __init__(self, place: Place, rank: int):
        super().__init__()
        out, inp = place.out, place.inp
        self.P = nn.Parameter(torch.zeros(out, rank))
        self.E = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.zeros(rank, inp))
        self.register_buffer("P0", torch.zeros(out, rank))
        self.register_buffer("E0", torch.zeros(rank))
        self.register_buffer("Q0", torch.zeros(rank, inp))
        if out != inp:
            self.register_buffer("high", torch.zeros(max(out, inp), min(out, inp) - rank))
        for p in self.parameters():
            p.burnish_decay = False

    def start(self, U: Tensor, S: Tensor, Vt: Tensor) -> dict[str, Tensor]:
        """The buffers by name, of a decomposition of the weight whose values fall."""
        k = S.numel() - self.E.numel()
        found = {"P0": U[:, k:], "E0": S[k:], "Q0": Vt[k:]}
        if (long := self.P.shape[0] - self.Q.shape[1]) != 0:
            found["high"] = U[:, :k] if long > 0 else Vt[:k].t()
        return found

    @torch.no_grad()
    def begin(self, U: Tensor, S: Tensor, Vt: Tensor) -> None:
        for name, value in self.start(U, S, Vt).items():
            self.get_buffer(name).copy_(value)
        for there, value in ((self.P, self.P0), (self.E, self.E0), (self.Q, self.Q0)):
            there.copy_(value)

    def aside(self, dP: Tensor, dQ: Tensor) -> tuple[Tensor, Tensor]:
        """Both without what lies in the leading directions."""
        long = self.P.shape[0] - self.Q.shape[1]
        dP = dP - self.high @ (self.high.t() @ dP) if long > 0 else self.P0 @ (self.P0.t() @ dP)
        dQ = dQ - (dQ @ self.high) @ self.high.t() if long < 0 else (dQ @ self.Q0.t()) @ self.Q0
        return dP, dQ

    def low_rank(self) -> tuple[Tensor, Tensor]:
        C, C0 = self.P * self.E, self.P0 * self.E0
        return torch.cat([self.Q, self.Q - self.Q0]), torch.cat([C - C0, C0], 1)

    def dense(self) -> Tensor:
        # the values themselves, with the gradients of what moves beside the leading directions
        dP, dQ = self.aside(self.P - self.P.detach(), self.Q - self.Q.detach())
        P, Q, C0 = self.P.detach() + dP, self.Q.detach() + dQ, self.P0 * self.E0
        return (P * self.E - C0) @ Q + C0 @ (Q - self.Q0)

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        C, C0, Q = self.P * self.E, self.P0 * self.E0, self.Q[:, i0:i1]
        return ((C - C0) @ Q).addmm_(C0, Q - self.Q0[:, i0:i1])

    def pull(self, i0: int, i1: int, G: Tensor, state: Any, grads: list[Tensor | None]) -> Tensor:
        G = G.to(self.P.dtype)
        if grads[0] is None:
            grads[:] = [torch.zeros_like(t) for t in (self.P, self.E, self.Q)]
        dP, dE, dQ = grads
        dC = G @ self.Q[:, i0:i1].t()
        dP.addcmul_(dC, self.E)
        dE.add_((dC * self.P).sum(0))
        dQ[:, i0:i1] = (self.P * self.E).t() @ G
        if i1 == self.Q.shape[1]:                # the last panel: both are whole
            grads[0], grads[2] = self.aside(dP, dQ)
        return self.tile(i0, i1, state)
