"""A chain whose update is told apart by directions of the outputs, and what that may cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.site import Place
from .factor import Chain


class Guarded(Chain):
    """``Delta = s B A = P Delta + (I - P) Delta``, P = U U^T: U (out, m) orthonormal, frozen.

    mu (m,): how much each direction counts, the largest 1. Both are in the file.
    """

    U: Tensor
    mu: Tensor

    def __init__(self, place: Place, rank: int, scale: float, directions: int):
        super().__init__(place, rank, scale)
        self.A.burnish_decay = self.B.burnish_decay = False
        self.register_buffer("U", torch.zeros(place.out, directions))
        self.register_buffer("mu", torch.zeros(directions))

    @torch.no_grad()
    def guard(self, U: Tensor, S: Tensor) -> None:
        self.U.copy_(U)
        self.mu.copy_(S / S.amax().clamp(min=torch.finfo(S.dtype).tiny))

    def critical(self) -> Tensor:
        """``||diag(mu)^(1/2) U^T Delta||_F^2``, through r x r matrices."""
        C, K = self.U.t() @ self.B, self.A @ self.A.t()
        return self.scale**2 * ((C * self.mu.unsqueeze(1)).t() @ C * K).sum()

    def task(self) -> Tensor:
        """``||(I - P) Delta||_F^2``, through r x r matrices."""
        T, K = self.B - self.U @ (self.U.t() @ self.B), self.A @ self.A.t()
        return self.scale**2 * (T.t() @ T * K).sum()


class Collision:
    """``sum_ij eta_ij |(P Delta)_ij ((I - P) Delta)_ij|``.

    eta = 1 + beta sigmoid(|W + Delta| - tau), entry by entry. W and the update are looked at a run
    of columns at a time, for the value and for the gradients of A and B: nothing of W's size is
    made. weight: gives W, (out, in). panel: entries at once.
    """

    def __init__(self, term: Guarded, weight: Callable[[], Tensor], factor: float, beta: float,
                 tau: float, panel: int = 1 << 22):
        self.term, self.weight, self.factor = term, weight, factor
        self.beta, self.tau, self.panel = beta, tau, panel

    def part(self, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        """The sum over some columns of W, those of A."""
        U, s = self.term.U, self.term.scale
        C = U @ (U.t() @ B)
        first, second = C @ A * s, (B - C) @ A * s
        eta = 1 + self.beta * torch.sigmoid((W + first + second).abs() - self.tau)
        return (eta * (first * second).abs()).sum() * self.factor

    def runs(self) -> list[tuple[int, int]]:
        out, inp = self.term.B.shape[0], self.term.A.shape[1]
        step = max(1, self.panel // out)
        return [(i, min(i + step, inp)) for i in range(0, inp, step)]

    def value(self) -> Tensor:
        A, B, W = self.term.A, self.term.B, self.weight().detach()
        return torch.stack([self.part(A[:, i:j], B, W[:, i:j].to(A.dtype))
                            for i, j in self.runs()]).sum()

    def grads(self) -> list[Tensor]:
        """By A and by B."""
        A, B, W = self.term.A.detach(), self.term.B.detach(), self.weight().detach()
        dA, dB = [], torch.zeros_like(B)
        for i, j in self.runs():
            with torch.enable_grad():
                a, b = A[:, i:j].clone().requires_grad_(), B.clone().requires_grad_()
                da, db = torch.autograd.grad(self.part(a, b, W[:, i:j].to(A.dtype)), (a, b))
            dA.append(da)
            dB += db
        return [torch.cat(dA, 1), dB]
