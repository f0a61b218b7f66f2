from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.update.rules import Rows, Whole
from ...blocks.update.step import Inner
from ...blocks.update.subspace import panels
from ...blocks.update.sweep import strip
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Factored(Whole):
    """See :class:`Adafactor`."""

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


def _rms(rows: Rows, strips: list[tuple[int, int]], n: int) -> Tensor:
    squares = [torch.linalg.vector_norm(rows(lo, hi)).square() for lo, hi in strips]
    return (torch.stack(squares).sum() / n).sqrt()


@dataclass(frozen=True, kw_only=True)
class Adafactor(Method):
    """Adafactor: Adam's second moment as one number per row and one per column.

        b_t = 1 - t^(-c)
        R <- b R + (1 - b) rowmean(G^2 + 1e-30)          (m,)
        C <- b C + (1 - b) colmean(G^2 + 1e-30)          (n,)
        U = G / sqrt(R C^T / mean(R)),   U <- U / max(1, RMS(U) / d)
        W <- W (1 - lr wd) - lr U        times max(1e-3, RMS(W)) with scale_parameter

    State m + n per matrix (m n more with beta1); vectors keep V in full. Convolutions are seen as
    (out, rest). No temporary is larger than a strip. The learning rate is the caller's, as for
    AdamW; with scale_parameter, 1e-3 is published for fine-tuning.
    """

    paper: ClassVar[str] = ("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (2018), "
                            "arXiv:1804.04235")
    tier: ClassVar[str] = "checked against an independent equation"

    decay_rate: float = setting(0.8, "c, how fast the moments come to rest")
    clip: float = setting(1.0, "d, the root mean square an update is cut to")
    beta1: float = setting(0.0, "of a running mean of U; 0 keeps none")
    scale_parameter: bool = setting(False, "steps relative to the weight's own size")
    weight_decay: float = setting(0.0, "decay of the weights, times lr")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Inner:
        return Inner(rule=Factored(
            decay_rate=self.decay_rate, clip=self.clip, beta1=self.beta1,
            scale_parameter=self.scale_parameter, weight_decay=self.weight_decay))

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        n = math.prod(shape)
        held = n if len(shape) < 2 else shape[0] + n // shape[0]
        return (held + (n if self.beta1 else 0)) * max(itemsize, 4)
