"""The kernel delta (:mod:`~burnish.blocks.weight.tiled`) by kernels of our own.

The threshold takes three histogram passes over the bits of |K| (11 + 11 + 10), for both order
statistics that it lies between; nothing of it reaches the host. Panels are written once, as the
products behind them want them. Of what flows back rows and columns are summed by kernels of their
own, each program its part, and the parts by torch: no result depends on which came first.

K is made again in every pass: 3 rank + 30 operations an entry, beside the 2 N of the product that
each entry takes part in. Kept of a mixed kernel: two numbers an input feature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..choose import quantile
from .road import blocks, launch

if TYPE_CHECKING:
    from ..weight.tiled import KernelDelta

IB, OB = 16, 64
#: programs that keep a device busy: sums are cut into parts until there are so many
BUSY = 512
#: bits of each digit of |K|, from above
DIGITS = (11, 11, 10)


class Entries:
    """What the kernels read of a term."""

    def __init__(self, term: KernelDelta, stats: Tensor | None = None):
        from . import distances_kernels

        self.kernels = distances_kernels
        self.A, self.B = term.A.detach().contiguous(), term.B.detach().contiguous()
        self.inp, self.out, self.q = term.inp, term.out, self.A.shape[2]
        self.mixed, self.square = term.mixed, term.magnitude != "linear"
        self.mix = (self.A,) * 3                 # pointers that nobody follows
        if self.mixed:
            self.mix = tuple(p.detach() for p in (term.alpha, term.gamma, term.beta))
        self.stats = self.A if not self.mixed else self._softmax() if stats is None else stats

    def _softmax(self) -> Tensor:
        """The largest D / gamma of each row, and the sum of the exponentials: (2, in)."""
        stats = torch.empty(2, self.inp, dtype=torch.float32, device=self.A.device)
        launch(self.kernels.softmax, -(-self.inp // IB), self.A, self.B, self.mix[1], stats,
               self.inp, self.out, Q=self.q, IB=IB, OB=OB)
        return stats

    def _all(self, tau: Tensor | None) -> tuple[Any, ...]:
        return (self.A, self.B, *self.mix, self.stats, self.A if tau is None else tau)

    def _constants(self, tau: Tensor | None) -> dict[str, Any]:
        return {"Q": self.q, "MIXED": self.mixed, "SQUARE": self.square, "CUT": tau is not None,
                "IB": IB, "OB": OB}

    # -- the threshold -----------------------------------------------------------------------------
    def threshold(self, s: float) -> Tensor:
        """The s-quantile of |K|, a number in fp32."""
        return quantile.between(self._ranked, self.inp * self.out, s)

    def _ranked(self, k: int) -> tuple[Tensor, Tensor]:
        """Entries k and k + 1 of |K| in ascending order."""
        ranks: list[Any] = [k, min(k + 1, self.inp * self.out - 1)]
        bits = [torch.zeros((), dtype=torch.int64, device=self.A.device)] * 2
        for level, width in enumerate(DIGITS):
            size = 1 << (width if level else width - 1)          # the sign is no part of it
            prefix = torch.stack(bits).to(torch.int32)
            found = torch.zeros(2, size, dtype=torch.int64, device=self.A.device)
            launch(self.kernels.counts, -(-self.inp // IB), self.A, self.B, *self.mix, self.stats,
                   prefix, found, self.inp, self.out, Q=self.q, MIXED=self.mixed, LEVEL=level,
                   BINS=size, IB=IB, OB=OB)
            for j in (0, 1):
                digit, ranks[j] = quantile.digit_of(found[j if level else 0], ranks[j])
                bits[j] = (bits[j] << width) + digit
        first, second = (b.to(torch.int32).view(torch.float32) for b in bits)
        return first, second

    def alive(self, tau: Tensor) -> int:
        """Entries above the threshold."""
        n = -(-self.inp // IB)
        found = torch.empty(n, dtype=torch.int32, device=self.A.device)
        launch(self.kernels.alive, n, self.A, self.B, *self.mix, self.stats, tau, found, self.inp,
               self.out, Q=self.q, MIXED=self.mixed, IB=IB, OB=OB)
        return int(found.sum())

    # -- panels ------------------------------------------------------------------------------------
    def panel(self, i0: int, i1: int, tau: Tensor | None) -> Tensor:
        """Rows i0:i1 of Delta transposed, (i1 - i0, out)."""
        delta = self.A.new_empty(i1 - i0, self.out)
        launch(self.kernels.panel, -(-(i1 - i0) // IB) * -(-self.out // OB), *self._all(tau), delta,
               i0, i1, self.inp, self.out, **self._constants(tau))
        return delta

    def pull(self, i0: int, i1: int, G: Tensor, tau: Tensor | None,
             grads: list[Tensor | None]) -> Tensor:
        """The same, and its part added to `grads` of A, B (and alpha, gamma, beta). G (out, n)."""
        n, kernels, fp32 = i1 - i0, self.kernels, {"dtype": torch.float32}
        read = (*self._all(tau), G, *G.stride())
        rows, wide, constants = -(-n // IB), -(-self.out // OB), self._constants(tau)
        share = slope = self.A
        QB = blocks(self.q, 1 << 30, 1)
        parts, per = parts_of(rows, wide, OB)
        if self.mixed:
            own = {k: v for k, v in constants.items() if k != "MIXED"}
            sums = self.A.new_empty(2, parts, n, **fp32)
            launch(kernels.shares, rows * parts, *read, *sums, i0, i1, self.inp, self.out, per,
                   **own)
            share, straight = sums.sum(1)
            slope = self.A.new_empty(parts, n, **fp32)
        delta = self.A.new_empty(n, self.out)
        dA = self.A.new_empty(parts, 2, n, self.q, **fp32)
        launch(kernels.back_rows, rows * parts, *read, share, delta, dA, slope, i0, i1, self.inp,
               self.out, per, QB=QB, **constants)
        grads[0][:, i0:i1] += dA.sum(0)                             # type: ignore[index]
        parts, per = parts_of(wide, rows, IB)
        dB = self.A.new_empty(parts, 2, self.out, self.q, **fp32)
        launch(kernels.back_columns, wide * parts, *read, share, dB, i0, i1, self.inp, self.out,
               per, QB=QB, **constants)
        grads[1] += dB.sum(0)
        if self.mixed:
            alpha, gamma, _ = (p.float() for p in self.mix)
            grads[2] += share.sum()
            grads[3] -= alpha / gamma**2 * slope.sum()
            grads[4] += straight.sum()
        return delta


def parts_of(programs: int, steps: int, length: int) -> tuple[int, int]:
    """(parts that each sum is cut into, entries of a part): `steps` blocks of `length` are summed
    by so many `programs`."""
    steps = max(1, steps)                        # a part of nothing is zero
    parts = max(1, min(steps, BUSY // max(1, programs)))
    per = -(-steps // parts)
    return -(-steps // per), per * length
