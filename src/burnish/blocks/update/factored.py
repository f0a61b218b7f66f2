"""Adafactor's rule: second moments as a number per row and one per column.

A tensor is read by strips. Tensors that are one strip each are stepped side by side
(:meth:`Factored.together`): the same arithmetic in the same order, with one call of torch for a
step of all of them where it has one, since on small tensors the calls are what takes the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .rules import Rows, Whole, accumulator
from .subspace import panels
from .sweep import strip


@dataclass(frozen=True, kw_only=True)
class Factored(Whole):
    """Adafactor (Shazeer and Stern, 2018): its equations stand in the method of that name."""

    name: ClassVar[str] = "adafactor"

    decay_rate: float
    clip: float
    beta1: float
    scale_parameter: bool
    weight_decay: float

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        held = {"row": shape[:1], "col": shape[1:]} if len(shape) == 2 else {"exp_avg_sq": shape}
        return {**held, "exp_avg": shape} if self.beta1 else held

    def rows(self, G: Tensor, weight: Rows, state: Mapping[str, Tensor], t: int,
             group: Mapping[str, Any]) -> Rows:
        """G is read three times, by strips: for the moments, for RMS(U), for U itself."""
        strips = list(panels(len(G), G[:1].numel(), strip(G.device)))
        r, c = self._factors(G, strips, state, t ** -group["decay_rate"])

        def u(lo: int, hi: int) -> Tensor:
            rows = G[lo:hi] * r[lo:hi]                  # in the dtype of r
            return rows.mul_(c) if c is not None else rows

        r.div_((_rms(u, strips, G.numel()) / group["clip"]).clamp_(min=1.0))
        scale = 1.0 if not group["scale_parameter"] else \
            _rms(weight, strips, G.numel()).clamp_(min=1e-3)
        if not group["beta1"]:
            r.mul_(scale)
            return u
        m = state["exp_avg"]
        return lambda lo, hi: m[lo:hi].lerp_(u(lo, hi), 1 - group["beta1"]) * scale

    def _factors(self, G: Tensor, strips: list[tuple[int, int]], state: Mapping[str, Tensor],
                 new: float) -> tuple[Tensor, Tensor | None]:
        """(of rows, of columns): U = G times both, after the moments have moved by `new`."""
        if G.dim() == 1:
            V = state["exp_avg_sq"]
            return V.lerp_(G.to(V.dtype).square().add_(1e-30), new).rsqrt(), None
        R, C = state["row"], state["col"]
        mean, total = torch.empty_like(R), torch.zeros_like(C)
        for lo, hi in strips:
            square = G[lo:hi].to(R.dtype).square()
            mean[lo:hi] = square.mean(1)
            total += square.sum(0)
        R.lerp_(mean.add_(1e-30), new)
        C.lerp_(total.div_(len(G)).add_(1e-30), new)
        return (R / R.mean()).rsqrt_()[:, None], C.rsqrt()

    def together(self, Gs: list[Tensor], Ws: list[Tensor], states: Sequence[Mapping[str, Tensor]],
                 t: int, group: Mapping[str, Any]) -> list[Tensor]:
        """u of each, as :meth:`rows` gives it of tensors that are one strip: bit for bit."""
        gs = [G.to(accumulator(G.dtype)) for G in Gs]
        rs, cs = self._all_factors(gs, states, t ** -group["decay_rate"])
        torch._foreach_div_(rs, [x.div_(group["clip"]).clamp_(min=1.0)
                                 for x in _all_rms(_times(gs, rs, cs))])
        us = _times(gs, rs, cs)
        scales = [x.clamp_(min=1e-3) for x in _all_rms(Ws)] if group["scale_parameter"] else None
        if group["beta1"]:
            ms = [state["exp_avg"] for state in states]
            torch._foreach_lerp_(ms, us, 1 - group["beta1"])
            us = list(torch._foreach_mul(ms, scales)) if scales else ms
        elif scales:
            torch._foreach_mul_(rs, scales)
            us = _times(gs, rs, cs)
        return us

    @staticmethod
    def _all_factors(gs: list[Tensor], states: Sequence[Mapping[str, Tensor]], new: float
                     ) -> tuple[list[Tensor], list[Tensor] | None]:
        """As :meth:`_factors`, of tensors that all have as many dimensions."""
        squares = torch._foreach_mul(gs, gs)
        if gs[0].dim() == 1:
            Vs = [state["exp_avg_sq"] for state in states]
            torch._foreach_add_(squares, 1e-30)
            torch._foreach_lerp_(Vs, squares, new)
            return list(torch._foreach_rsqrt(Vs)), None
        Rs, Cs = ([state[k] for state in states] for k in ("row", "col"))
        for held, means in ((Rs, [s.mean(1) for s in squares]),
                            (Cs, [s.sum(0).div_(len(s)) for s in squares])):
            torch._foreach_add_(means, 1e-30)
            torch._foreach_lerp_(held, means, new)
        rs = torch._foreach_div(Rs, [R.mean() for R in Rs])
        torch._foreach_rsqrt_(rs)
        return [r[:, None] for r in rs], list(torch._foreach_rsqrt(Cs))


def _rms(rows: Rows, strips: list[tuple[int, int]], n: int) -> Tensor:
    squares = [torch.linalg.vector_norm(rows(lo, hi)).square() for lo, hi in strips]
    return (torch.stack(squares).sum() / n).sqrt()


def _times(gs: list[Tensor], rs: list[Tensor], cs: list[Tensor] | None) -> list[Tensor]:
    us = list(torch._foreach_mul(gs, rs))
    if cs is not None:
        torch._foreach_mul_(us, cs)
    return us


def _all_rms(xs: Sequence[Tensor]) -> list[Tensor]:
    norms = torch.stack(torch._foreach_norm(list(xs)))
    sizes = torch.tensor([x.numel() for x in xs], dtype=norms.dtype).to(norms.device)
    return list(norms.square_().div_(sizes).sqrt_().unbind())
