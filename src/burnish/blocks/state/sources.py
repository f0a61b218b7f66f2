"""Frozen adapters of several tasks at one site, combined for another task.

    o_s = U_s act(D_s h + b_s) + c_s                    s = 1 .. S, frozen
    Scaled    f(h) = sum_s w_s * o_s                     w_s a vector or a number
    Fused     f(h) = V sum_s a_s o_s,  a = softmax_s((Q h + q) . K o_s)

No o_s is ever made. Scaled is one bottleneck of S M numbers, whose second matrix is made of the
w_s, and keeps those numbers alone. Fused compares and sums in the bottlenecks:
``(Q h + q) . K o_s = (U_s^T k) . z_s + k . c_s`` with ``k = K^T (Q h + q)``; it keeps h, and the
rest is made again in backward.

Letters: S sources, D width, M width of a bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.cast import autocast
from ..tape.executor import checkpoint
from ..tape.functions import applied, once_differentiable, transformed
from .bottleneck import Bottleneck, activation


class _Frozen(torch.autograd.Function):
    """x W^T of a W that does not train: keeps W as it is held, and nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return F.linear(x, W.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return g @ W.to(g.dtype), None


class Sources(nn.Module):
    """down (S, M, D), down_bias (S, M), up (S, D, M), up_bias (S, D), frozen: what :meth:`take` has
    given it, until then normal weights of deviation 0.02 and biases of 0."""

    def __init__(self, sources: int, d: int, width: int, act: str):
        super().__init__()
        activation(act)
        self.act = act
        for name, shape in (("down", (sources, width, d)), ("down_bias", (sources, width)),
                            ("up", (sources, d, width)), ("up_bias", (sources, d))):
            value = torch.zeros(shape) if name.endswith("bias") else torch.randn(shape) * 0.02
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def take(self, n: int, source: Bottleneck, where: str) -> None:
        """Be given the n-th adapter. RecipeError for one of another form."""
        odd = source.act != self.act or source.mixer is not None or source.norm_in is not None \
            or source.norm_out is not None or source.down.bias is None
        if odd or source.down.weight.shape != self.down.shape[1:]:
            width, d = self.down.shape[1:]
            raise RecipeError(f"{where} is no bottleneck of {width} {self.act} units and nothing "
                              f"else on a state of {d}, which the sources are")
        self.down[n] = source.down.weight
        self.down_bias[n] = source.down.bias
        self.up[n] = source.up.weight * source.scale
        self.up_bias[n] = source.up.bias * source.scale

    def inner(self, h: Tensor) -> Tensor:
        """(..., S M) before the activation."""
        W = self.down.flatten(0, 1)
        x = F.linear(h, W.to(h.dtype)) if transformed() else applied(_Frozen, h, W)
        return x + self.down_bias.flatten().to(h.dtype)

    def of(self, n: int, h: Tensor) -> Tensor:
        """o_s by itself: the reference."""
        z = activation(self.act)(F.linear(h, self.down[n], self.down_bias[n]))
        return F.linear(z, self.up[n], self.up_bias[n])


class Scaled(Sources):
    """``f(h) = sum_s w_s * o_s``; scales (S, D) or (S,), N(2 / S, 0.001), whose entries are dropped
    with probability `dropout` in training. shared: another site's scales, which it borrows."""

    scales: Tensor

    def __init__(self, sources: int, d: int, width: int, act: str, *, vector: bool, dropout: float,
                 shared: nn.Parameter | None = None):
        super().__init__(sources, d, width, act)
        self.dropout = dropout
        if shared is not None:
            self.__dict__["scales"] = shared
            return
        start = torch.randn((sources, d) if vector else (sources,)) * 0.001 + 2 / sources
        self.scales = nn.Parameter(start)
        self.scales.burnish_decay = False        # it would pull the sources to nothing

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another site holds, for whoever runs this again in backward."""
        return () if "scales" in self._parameters else (self.scales,)

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (self.inner(autocast(h)),), {})

    def run(self, z: Tensor) -> Tensor:
        """f of the sources' inner numbers (..., S M)."""
        W, b = self.second()
        return F.linear(activation(self.act)(z), W.to(z.dtype), b.to(z.dtype))

    def second(self) -> tuple[Tensor, Tensor]:
        """(D, S M) and (D,): the second matrix of all of them together."""
        w = F.dropout(self.scales, self.dropout, self.training and self.dropout > 0)
        w = w.view(len(w), -1)                   # (S, D) or (S, 1)
        W = (w.unsqueeze(-1) * self.up).transpose(0, 1).flatten(1)
        return W, (w * self.up_bias).sum(0)

    @torch.no_grad()
    def plain(self) -> Bottleneck:
        """The same function as one bottleneck of S M units."""
        made = wide(self.up.shape[1], self.down.shape[0] * self.down.shape[1],
                    self.act).to(self.up.device)
        dropout, self.dropout = self.dropout, 0.0
        W, b = self.second()
        self.dropout = dropout
        for p, value in zip(made.parameters(), (self.down.flatten(0, 1), self.down_bias.flatten(),
                                                W, b), strict=True):
            p.copy_(value)
        return made


def wide(d: int, width: int, act: str) -> Bottleneck:
    """What sources are together, once their scales are settled."""
    return Bottleneck(d, width, act=act)


class Fused(Sources):
    """``f(h) = V sum_s a_s o_s``. Q, K (D, D) N(0, 0.02), q (D,) zero, V (D, D) the identity.

    A bias of the keys would add one number to the scores of all sources, which softmax does not
    see: there is none.
    """

    def __init__(self, sources: int, d: int, width: int, act: str):
        super().__init__(sources, d, width, act)
        self.query = nn.Linear(d, d)
        self.key, self.value = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.normal_(self.key.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (autocast(h),), {})

    def run(self, h: Tensor) -> Any:
        """f itself."""
        S, M, _ = self.down.shape
        like = h.dtype
        Q, q, K, V, up, bias = (t.to(like) for t in (
            self.query.weight, self.query.bias, self.key.weight, self.value.weight, self.up,
            self.up_bias))
        z = activation(self.act)(F.linear(h, self.down.flatten(0, 1).to(like),
                                          self.down_bias.flatten().to(like)))
        k = F.linear(h, Q, q) @ K
        flat = up.transpose(0, 1).flatten(1)                       # (D, S M)
        scores = ((k @ flat) * z).unflatten(-1, (S, M)).sum(-1) + k @ bias.t()
        a = scores.to(torch.promote_types(like, torch.float32)).softmax(-1).to(like)
        mixed = (z.unflatten(-1, (S, M)) * a.unsqueeze(-1)).flatten(-2)
        return (mixed @ flat.t() + a @ bias) @ V.t()
