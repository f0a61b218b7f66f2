"""Kernelised sparse updates, generated panel by panel (SNELL, SNELLA).

Two thin factors and a distance make a full-rank (out, in) matrix K; a magnitude competition keeps
its largest entries. Nothing of size in x out is ever kept: panels are made in forward and again
in backward. Letters: O out, I in, H heads, Q = rank / heads.

    d_h[o, i] = || B_h[o] - A_h[i] ||_p
    D = 0.1 (d_1 - d_2)                       K = D                              (SNELL)
    K = D + alpha softmax_o(D / gamma) + beta                                    (SNELLA)
    Delta = K |K| 1[|K| > tau]   with the factor |K| 1[...] held constant in the gradient
    tau = the s-quantile of |K| over the matrix

The gradient of Delta in K is |K| on survivors and zero elsewhere; nothing flows into tau.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.site import Place
from . import quantile
from .provided import PANEL, Term

COEFFICIENT = 0.1


class _State:
    """tau of one forward, and, until it is used, the panel that the quantile pass has made."""

    __slots__ = ("tau", "panel")

    def __init__(self, tau: Tensor | None, panel: Tensor | None):
        self.tau, self.panel = tau, panel


class KernelDelta(Term):
    """The update above on one matrix.

    A: (2, in, q), B: (2, out, q), q = rank // 2; alpha, gamma, beta: scalars when `mixed`.
    sparsity: share of entries that are zero, in [0, 1); a controller may change it.
    magnitude: "signed_square" (Delta = K |K| on survivors) or "linear" (Delta = K, the dense
    form the authors use at s = 0).
    """

    tiled: ClassVar[bool] = True

    def __init__(self, place: Place, rank: int, sparsity: float, mixed: bool, norm_p: float = 2.0,
                 magnitude: str = "signed_square", dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        q = rank // 2
        a, b = 1 / math.sqrt(place.inp * q), 1 / math.sqrt(place.out * q)
        self.A = nn.Parameter(torch.empty(2, place.inp, q).uniform_(-a, a))
        self.B = nn.Parameter(torch.empty(2, place.out, q).uniform_(-b, b))
        self.mixed, self.norm_p, self.magnitude = mixed, float(norm_p), magnitude
        self.out, self.inp = place.out, place.inp
        if mixed:
            self.alpha = nn.Parameter(torch.ones(()))
            self.gamma = nn.Parameter(torch.ones(()))
            self.beta = nn.Parameter(torch.zeros(()))
        self.sparsity = float(sparsity)
        self.dropout, self.drop_path = dropout, drop_path

    # the sparsity a controller has set is part of the adapter
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.sparsity], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.sparsity = float(state[0])

    # -- the kernel -----------------------------------------------------------------------------
    def distances(self, i0: int, i1: int) -> tuple[Tensor, Tensor]:
        """d_1, d_2 of a panel, by direct differences: the Gram form cancels."""
        def d(h: int) -> Tensor:
            return torch.cdist(self.B[h], self.A[h, i0:i1], p=self.norm_p,
                               compute_mode="donot_use_mm_for_euclid_dist")
        return d(0), d(1)

    def kernel(self, i0: int, i1: int) -> Tensor:
        """K[:, i0:i1], (out, n). A panel of inputs is self-contained: softmax runs over out."""
        d1, d2 = self.distances(i0, i1)
        return self._mix(d1.sub_(d2).mul_(COEFFICIENT))[0]

    def _mix(self, D: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.mixed:
            return D, None
        S = torch.softmax(D / self.gamma, dim=0)
        return (D + self.beta).addcmul_(S, self.alpha), S

    def _gate(self, K: Tensor, tau: Tensor | None) -> Tensor | None:
        """The constant factor: |K| on survivors, 0 elsewhere; None where it is 1."""
        if self.magnitude == "linear":
            return None if tau is None else (K.abs() > tau).to(K.dtype)
        gate = K.abs()
        return gate if tau is None else gate.mul_(gate > tau)

    def kernel_reference(self) -> Tensor:
        """K of the whole matrix by differentiable torch functions."""
        diff = (self.B[:, :, None, :] - self.A[:, None, :, :]).abs()
        if self.norm_p == 2.0:
            square = diff.square().sum(-1)
            d = torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
        else:
            d = torch.linalg.vector_norm(diff, self.norm_p, dim=-1)
        D = COEFFICIENT * (d[0] - d[1])
        if not self.mixed:
            return D
        return D + self.alpha * torch.softmax(D / self.gamma, dim=0) + self.beta

    def dense(self) -> Tensor:
        K = self.kernel_reference()
        with torch.no_grad():
            tau = self.prepare().tau
            gate = self._gate(K.detach(), tau)
        return K if gate is None else K * gate

    # -- the threshold --------------------------------------------------------------------------
    def _ranges(self) -> Iterator[tuple[int, int]]:
        step = max(1, min(self.inp, PANEL // self.out))
        for i0 in range(0, self.inp, step):
            yield i0, min(self.inp, i0 + step)

    @torch.no_grad()
    def prepare(self) -> _State:
        if self.sparsity <= 0:
            return _State(None, None)
        ranges = list(self._ranges())
        only = self.kernel(0, self.inp) if len(ranges) == 1 else None
        absolute = only.abs() if only is not None else None

        def stream() -> Iterator[Tensor]:
            if absolute is not None:
                yield absolute
                return
            for i0, i1 in ranges:
                yield self.kernel(i0, i1).abs_()

        tau = quantile.quantile(stream, self.out * self.inp, self.sparsity,
                                self._sample(absolute))
        return _State(tau, only)

    def _sample(self, absolute: Tensor | None) -> Tensor:
        n = self.out * self.inp
        if absolute is not None:
            # a stride coprime to the row length visits all columns
            stride = max(1, n // quantile.SAMPLE)
            while math.gcd(stride, self.inp) > 1:
                stride += 1
            return absolute.flatten()[::stride]
        columns = max(1, min(self.inp, 4 * quantile.SAMPLE // self.out + 1))
        index = torch.linspace(0, self.inp - 1, columns, device=self.A.device).long()
        parts = [self.kernel(int(i), int(i) + 1).abs_() for i in index.tolist()] \
            if not _fake(self.A) else [self.kernel(i, i + 1).abs_() for i in range(columns)]
        return torch.cat(parts)

    # -- panels -----------------------------------------------------------------------------------
    @torch.no_grad()
    def tile(self, i0: int, i1: int, state: _State) -> Tensor:
        whole = i0 == 0 and i1 == self.inp
        K, state.panel = (state.panel if whole else None), None
        K = self.kernel(i0, i1) if K is None else K
        gate = self._gate(K, state.tau)
        return K if gate is None else K.mul_(gate)

    @torch.no_grad()
    def pull(self, i0: int, i1: int, G: Tensor, state: _State,
             grads: list[Tensor | None]) -> Tensor:
        G = G.to(self.A.dtype)
        d1, d2 = self.distances(i0, i1)
        D = (d1 - d2).mul_(COEFFICIENT)
        K, S = self._mix(D)
        gate = self._gate(K, state.tau)
        dK = G.clone() if gate is None else G * gate
        if self.mixed:
            self._add(grads, 2, (S * dK).sum())
            self._add(grads, 4, dK.sum())
            p = (S * dK).sum(0, keepdim=True)
            through = (dK - p).mul_(S)                      # softmax's own gradient
            self._add(grads, 3, -(self.alpha / self.gamma**2) * (through * D).sum())
            dK.addcmul_(through, self.alpha / self.gamma)
            del through, S
        self._add_factors(grads, i0, i1, dK, (d1, d2))
        if gate is None:
            return K
        return K.mul_(gate)

    def _add_factors(self, grads: list[Tensor | None], i0: int, i1: int, dD: Tensor,
                     d: tuple[Tensor, Tensor]) -> None:
        """dA, dB through both distances; the gradient of a zero distance is zero."""
        if grads[0] is None:
            grads[0], grads[1] = torch.zeros_like(self.A), torch.zeros_like(self.B)
        dA, dB = grads[0], grads[1]
        for h, c in ((0, COEFFICIENT), (1, -COEFFICIENT)):
            A, B = self.A[h, i0:i1], self.B[h]
            if self.norm_p == 2.0:
                R = dD / d[h]
                R.masked_fill_(d[h] == 0, 0.0).mul_(c)
                dB[h] += R.sum(1, keepdim=True) * B - R @ A
                dA[h, i0:i1] += R.sum(0).unsqueeze(1) * A - R.t() @ B
            else:
                with torch.enable_grad():
                    a, b = A.detach().requires_grad_(), B.detach().requires_grad_()
                    dist = torch.cdist(b, a, p=self.norm_p)
                    ga, gb = torch.autograd.grad(dist, (a, b), dD * c)
                dA[h, i0:i1] += ga
                dB[h] += gb

    @staticmethod
    def _add(grads: list[Tensor | None], k: int, value: Tensor) -> None:
        grads[k] = value if grads[k] is None else grads[k] + value

    def nnz(self) -> int:
        """Entries of the update that are not zero now."""
        tau = self.prepare().tau
        if tau is None:
            return self.out * self.inp
        return sum(int((self.kernel(a, b).abs_() > tau).sum()) for a, b in self._ranges())

    def stats(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity}


def _fake(t: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)
