"""Distances between the rows of two thin factors, strip by strip, and what flows back.

    d_h[i, o] = || A_h[i] - B_h[o] ||_p        A: (H, I, Q), B: (H, O, Q); a strip is (n, O)

By direct differences: what is wanted are small differences of distances, and the Gram form cancels.
On a processor each of the Q features is two passes over a strip that stays in cache (`cdist` takes
twice as long), and products with a thin factor run along the strip's rows: a fifth of the time of
(n, O) x (O, Q).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...core.followed import written_down


class Distances:
    """Strips of both distances (H = 2), in buffers that the next strip uses again.

    rows: of the longest strip. buffers: how many a caller wants for itself, see :meth:`buffer`.
    """

    def __init__(self, A: Tensor, B: Tensor, p: float, rows: int, buffers: int):
        self.A, self.B, self.p = A.detach(), B.detach(), p
        self.by_features = p == 2.0 and A.device.type == "cpu"
        own = 2 if self.by_features else 0
        self._own, self._room = own, self.A.new_empty(own + buffers, rows, B.shape[1])
        self._sums: Tensor | None = None

    @functools.cached_property
    def Bt(self) -> Tensor:
        """B along rows, (H, Q, O)."""
        return self.B.transpose(1, 2).contiguous()

    def buffer(self, k: int, n: int) -> Tensor:
        """The k-th buffer, n rows of it. The first one holds what the next call writes over."""
        return self._room[self._own + k, :n]

    def of(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """d_1, d_2 of features a to b; they hold until the next call."""
        if not self.by_features:
            d1, d2 = (torch.cdist(self.A[h, a:b], self.B[h], p=self.p,
                                  compute_mode="donot_use_mm_for_euclid_dist") for h in (0, 1))
            return d1, d2
        return self._euclid(0, a, b), self._euclid(1, a, b)

    def _euclid(self, h: int, a: int, b: int) -> Tensor:
        total, difference = self._room[h, : b - a], self.buffer(0, b - a)
        for k in range(self.A.shape[2]):
            into = difference if k else total
            torch.sub(self.Bt[h, k], self.A[h, a:b, k : k + 1], out=into)
            if k:
                total.addcmul_(difference, difference)
            else:
                total.mul_(total)
        return total.sqrt_()

    def pull(self, dA: Tensor, a: int, b: int, dd: Tensor, d: tuple[Tensor, Tensor],
             c: float) -> None:
        """Add to dA what ``dd = dL/dd_1 / c = -dL/dd_2 / c`` says; dB waits for :meth:`finish`.

        R = c dd / d: ``dA += rowsum(R) A - R B`` and ``dB += colsum(R) B - R^T A``; a row of ones
        on the factors gives product and sum in one pass. The gradient of a zero distance is zero.
        """
        q = self.A.shape[2]
        if self._sums is None:
            ones = self.Bt.new_ones(2, 1, self.Bt.shape[2])
            self._ends = torch.cat([self.Bt, ones], 1)
            self._sums = torch.zeros_like(self._ends)
        for h, sign in ((0, c), (1, -c)):
            if self.p != 2.0:
                self._pull_by_torch(dA, h, a, b, dd * sign)
                continue
            least = d[h].amin() if dd.device.type == "cpu" else None
            if least is None or on_host(least) and float(least) == 0:
                d[h].masked_fill_(d[h] == 0, math.inf)
            R = torch.div(dd, d[h], out=d[h])
            At = torch.cat([self.A[h, a:b].t(), self.A.new_ones(1, b - a)])
            right = self._ends[h] @ R.t()
            dA[h, a:b].add_((right[q] * At[:q] - right[:q]).t(), alpha=sign)
            self._sums[h].addmm_(At, R, alpha=sign)

    def _pull_by_torch(self, dA: Tensor, h: int, a: int, b: int, dd: Tensor) -> None:
        with torch.enable_grad():
            x, y = self.A[h, a:b].clone().requires_grad_(), self.B[h].clone().requires_grad_()
            gx, gy = torch.autograd.grad(torch.cdist(x, y, p=self.p), (x, y), dd)
        dA[h, a:b] += gx
        self._sums[h, :-1] -= gy.t()

    def finish(self, dB: Tensor) -> None:
        """Add what all strips said of B."""
        if self._sums is not None:
            q = self.A.shape[2]
            dB.add_((self._sums[:, q:] * self.Bt - self._sums[:, :q]).transpose(1, 2))


def on_host(t: Tensor) -> bool:
    """Its value may be read without stalling a device (it has one, and no program is made)."""
    return t.device.type == "cpu" and not isinstance(t, FakeTensor) and not written_down()
