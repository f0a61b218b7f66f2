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
from typing import Any

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..choose import quantile
from ..gpu.distances import Entries
from ..gpu.road import refusal
from .distance import Distances, on_host
from .dropped import Dropping
from .panels import PANEL

COEFFICIENT = 0.1
#: entries of a strip: on a CPU half a dozen buffers of it stay in cache, and its work is large
#: beside what calling an operator costs; elsewhere it is what keeps a device busy, since every
#: operation of a strip is a launch
STRIP = 1 << 18
LONG_STRIP = 1 << 20


class _State:
    """tau of one forward, and, until it is used, the panel that the quantile pass has made.

    stats: of Triton's kernels, where there is a softmax (blocks/gpu/distances.py)."""

    __slots__ = ("tau", "panel", "stats")

    def __init__(self, tau: Tensor | None, panel: Tensor | None, stats: Tensor | None = None):
        self.tau, self.panel, self.stats = tau, panel, stats


class KernelDelta(Dropping):
    """The update above on one matrix.

    A: (2, in, q), B: (2, out, q), q = rank // 2; alpha, gamma, beta: scalars when `mixed`.
    sparsity: share of entries that are zero, in [0, 1); a controller may change it; `budgeted`
    says that one does.
    magnitude: "signed_square" (Delta = K |K| on survivors) or "linear" (Delta = K, the dense
    form the authors use at s = 0).
    dropout, drop_path: in training; see dropped.py.
    """

    tiled = True

    def __init__(self, place: Place, rank: int, sparsity: float, mixed: bool, norm_p: float = 2.0,
                 magnitude: str = "signed_square", dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        q = rank // 2
        a, b = 1 / math.sqrt(place.inp * q), 1 / math.sqrt(place.out * q)
        self.A = nn.Parameter(torch.empty(2, place.inp, q).uniform_(-a, a))
        self.B = nn.Parameter(torch.empty(2, place.out, q).uniform_(-b, b))
        self.mixed, self.norm_p, self.magnitude = mixed, float(norm_p), magnitude
        self.dropout, self.drop_path = dropout, drop_path
        self.out, self.inp = place.out, place.inp
        if mixed:
            self.alpha = nn.Parameter(torch.ones(()))
            self.gamma = nn.Parameter(torch.ones(()))
            self.beta = nn.Parameter(torch.zeros(()))
        self.sparsity, self.budgeted = float(sparsity), False
        self._near = quantile.Near()

    # the sparsity a controller has set is part of the adapter
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.sparsity], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.sparsity = float(state[0])

    def road(self) -> str:
        """Why torch's operators make it, or "": one place decides (blocks/gpu/road.py)."""
        if self.norm_p != 2.0:
            return f"norm_p={self.norm_p:g}, and Triton's kernels are for 2"
        return refusal(self.A, self.B)

    # -- the kernel -----------------------------------------------------------------------------
    # Strips are (n, out): one row per input feature, so softmax and sums run along memory, and a
    # strip with all its temporaries stays in cache. Panels are (out, n) views of runs of strips.
    def _strips(self, i0: int, i1: int) -> Iterator[tuple[int, int]]:
        step = self._rows(i0, i1)
        for a in range(i0, i1, step):
            yield a, min(i1, a + step)

    def _distances(self, i0: int, i1: int, buffers: int = 1) -> Distances:
        """Of all strips of these input features."""
        return Distances(self.A, self.B, self.norm_p, self._rows(i0, i1), buffers)

    def _rows(self, i0: int, i1: int) -> int:
        """Of the longest strip."""
        strip = STRIP if self.A.device.type == "cpu" else LONG_STRIP
        return min(i1 - i0, max(1, strip // self.out))

    def _kernel(self, d: Distances, a: int, b: int, into: Tensor | None = None) -> Tensor:
        """K of a strip, by default in the first buffer of `d`."""
        into = d.buffer(0, b - a) if into is None else into
        d1, d2 = d.of(a, b)
        D = torch.sub(d1, d2, out=d1).mul_(COEFFICIENT)
        return self._mix(D, d2, into)[0]

    def _mix(self, D: Tensor, S: Tensor, K: Tensor) -> tuple[Tensor, Tensor | None]:
        """K and the softmax, written into these two."""
        if not self.mixed:
            return K.copy_(D), None
        alpha, gamma, beta = self._scalars()
        S = torch.softmax(torch.div(D, gamma, out=K), dim=1, out=S)
        if isinstance(alpha, float):                 # one vectorised pass
            return torch.add(D, S, alpha=alpha, out=K).add_(beta), S
        return torch.addcmul(beta, S, alpha, out=K).add_(D), S

    def _scalars(self) -> tuple[Any, Any, Any]:
        """alpha, gamma, beta: numbers where reading them stalls nothing, else tensors."""
        own = (self.alpha, self.gamma, self.beta)
        return tuple(float(p.detach()) for p in own) if on_host(self.alpha) else own

    def _gate(self, K: Tensor, tau: Tensor | None, into: Tensor | None = None) -> Tensor | None:
        """The constant factor: |K| on survivors, 0 elsewhere; None where it is 1."""
        if self.magnitude == "linear":
            return None if tau is None else (K.abs() > tau).to(K.dtype)
        gate = torch.abs(K, out=into)
        if tau is None:
            return gate
        if on_host(tau):
            return torch.nn.functional.threshold_(gate, float(tau), 0.0)
        return gate.mul_(gate > tau)

    def kernel_reference(self) -> Tensor:
        """K of the whole matrix, (out, in), by differentiable torch functions."""
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
            gate = self._gate(K.detach(), self.prepare().tau)
        return K if gate is None else K * gate

    # -- the threshold --------------------------------------------------------------------------
    @torch.no_grad()
    def prepare(self) -> _State:
        if not self.road():
            own = Entries(self)
            tau = own.threshold(self.sparsity) if self.sparsity > 0 else None
            return _State(tau, None, own.stats if self.mixed else None)
        if self.sparsity <= 0:
            return _State(None, None)
        whole = self.out * self.inp <= PANEL
        kept = self.A.new_empty(self.inp, self.out) if whole else None
        if kept is not None:
            d = self._distances(0, self.inp)
            for a, b in self._strips(0, self.inp):
                self._kernel(d, a, b, kept[a:b])
            del d

        def stream() -> Iterator[Tensor]:
            d = None if kept is not None else self._distances(0, self.inp)
            for a, b in self._strips(0, self.inp):
                yield kept[a:b].abs() if d is None else self._kernel(d, a, b).abs_()

        near = self._near if on_host(self.A) else None       # it moves little from step to step
        tau = quantile.quantile(stream, self.out * self.inp, self.sparsity,
                                lambda: self._sample(kept), self.A, near)
        return _State(tau, kept)

    def _sample(self, kept: Tensor | None) -> Tensor:
        """Some of the values: input features spread over the matrix, other outputs in each."""
        if kept is not None:
            stride = max(1, kept.numel() // quantile.SAMPLE)
            while math.gcd(stride, self.out) > 1:        # coprime to a row: visits all outputs
                stride += 1
            return kept.flatten()[::stride].abs()
        rows = min(self.inp, max(quantile.SAMPLE // self.out + 1, self.inp // 16))
        step = min(self.out, max(1, rows * self.out // quantile.SAMPLE))
        j = torch.arange(rows, device=self.A.device)
        start = (j * 0.6180339887498949 % 1.0 * step).long()
        columns = start[:, None] + step * torch.arange(self.out // step, device=j.device)
        sample = self.A.new_empty(columns.shape)
        d = Distances(self.A[:, j * (self.inp - 1) // max(1, rows - 1)], self.B, self.norm_p,
                      self._rows(0, rows), 1)
        for a, b in self._strips(0, rows):
            torch.gather(self._kernel(d, a, b), 1, columns[a:b], out=sample[a:b])
        return sample.abs_().flatten()

    # -- panels -----------------------------------------------------------------------------------
    def let_go(self, state: _State) -> None:
        state.panel = None

    @torch.no_grad()
    def tile(self, i0: int, i1: int, state: _State) -> Tensor:
        if not self.road():
            return Entries(self, state.stats).panel(i0, i1, state.tau).t()
        ready = state.panel is not None          # the quantile pass has made K already
        panel = state.panel[i0:i1] if ready else self.A.new_empty(i1 - i0, self.out)
        if i1 == self.inp:
            state.panel = None                   # and nobody asks for it again
        d = None if ready else self._distances(i0, i1)
        spare = self.A.new_empty(self._rows(i0, i1), self.out) if d is None else d.buffer(0, i1)
        for a, b in self._strips(i0, i1):
            K = panel[a - i0 : b - i0]
            if d is not None:
                self._kernel(d, a, b, K)
            gate = self._gate(K, state.tau, spare[: b - a])
            if gate is not None:
                K.mul_(gate)
        return panel.t()

    @torch.no_grad()
    def pull(self, i0: int, i1: int, G: Tensor, state: _State,
             grads: list[Tensor | None]) -> Tensor:
        if grads[0] is None:
            grads[0], grads[1] = torch.zeros_like(self.A), torch.zeros_like(self.B)
            if self.mixed:
                grads[2:5] = [torch.zeros_like(p) for p in (self.alpha, self.gamma, self.beta)]
        if not self.road():
            return Entries(self, state.stats).pull(i0, i1, G, state.tau, grads).t()
        Gt = G.t().to(self.A.dtype)
        panel = self.A.new_empty(i1 - i0, self.out)
        d = self._distances(i0, i1, 4)
        for a, b in self._strips(i0, i1):
            D, S, dK, spare = (d.buffer(k, b - a) for k in (0, 1, 2, 3))
            ds, K = d.of(a, b), panel[a - i0 : b - i0]
            torch.sub(*ds, out=D).mul_(COEFFICIENT)
            mixed = self._mix(D, S, K)[1] is not None
            gate = self._gate(K, state.tau, spare)
            if gate is None:
                dK.copy_(Gt[a - i0 : b - i0])
            else:
                torch.mul(Gt[a - i0 : b - i0], gate, out=dK)
                K.mul_(gate)
            if mixed:
                self._pull_mixed(grads, D, S, dK, spare)
            d.pull(grads[0], a, b, dK, ds, COEFFICIENT)
        d.finish(grads[1])
        return panel.t()

    def _pull_mixed(self, grads: list[Tensor | None], D: Tensor, S: Tensor, dK: Tensor,
                    spare: Tensor) -> None:
        """Gradients of the scalars of a strip; dK becomes dD. S and `spare` are used up."""
        alpha, gamma, _ = self._scalars()
        weighed = torch.mul(S, dK, out=spare)
        p = weighed.sum(1, keepdim=True)
        grads[2] += p.sum()
        grads[4] += dK.sum()
        weighed.sub_(S.mul_(p))                             # softmax's own gradient
        grads[3] -= (alpha / gamma**2) * (weighed.flatten() @ D.flatten())
        if isinstance(alpha, float):
            dK.add_(weighed, alpha=alpha / gamma)
        else:
            dK.add_(weighed.mul_(alpha / gamma))

    @torch.no_grad()
    def nnz(self) -> int:
        """Entries of the update that are not zero now."""
        state = self.prepare()
        tau = state.tau
        if tau is None:
            return self.out * self.inp
        if not self.road():
            return Entries(self, state.stats).alive(tau)
        d = self._distances(0, self.inp)
        return sum(int((self._kernel(d, a, b).abs_() > tau).sum())
                   for a, b in self._strips(0, self.inp))
