"""Several low-rank updates of one linear, weighed token by token by a router.

    y = s sum_e g_e(x) B_e A_e drop(x)

In the dense form all down-projections are one product (E R wide), the gates multiply it, and one
product goes up: for small R that is faster than sorting tokens by expert. Kept for backward: x
(once, however many experts), E R numbers and E gates per token.

Letters: N tokens, I in, O out, E experts, R rank.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..tape.cast import autocast, uncast
from ..tape.functions import once_differentiable, shaped, transformed
from ..tape.replay import Mask
from ..update.objective import Riding


class Product(torch.autograd.Function):
    """``x W^T`` in fp32, whatever x is held in; keeps x as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        need_x, need_W = ctx.needs_input_grad
        ctx.dtypes = x.dtype, W.dtype
        ctx.save_for_backward(x if need_W else None, W if need_x else None)
        return _product(x, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, W), (of_x, of_W) = ctx.saved_tensors, ctx.dtypes
        dx = None if W is None else (g @ W.to(g.dtype)).to(of_x)
        if x is None:
            return dx, None
        x2 = x.reshape(-1, x.shape[-1]).to(g.dtype)
        return dx, (g.reshape(-1, g.shape[-1]).t() @ x2).to(of_W)


def _product(x: Tensor, W: Tensor) -> Tensor:
    with uncast(x):
        y = F.linear(x.reshape(-1, x.shape[-1]).to(_wide(x)), W.to(_wide(x)))
        return shaped(y, (*x.shape[:-1], W.shape[0]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Weighed(torch.autograd.Function):
    """``s sum_e g_e B_e A_e drop(x)`` for x (..., I), gates (..., E), A (E, R, I), B (E, O, R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, A: Tensor, B: Tensor, scale: float,
                p: float) -> Tensor:
        ctx.scale = scale
        ctx.mask = Mask(x.reshape(-1, x.shape[-1]), p) if p else None
        ctx.A = A.shape, A.dtype
        with uncast(x):
            y, z = _weighed(x, gates, A, B, scale, p)
        ctx.save_for_backward(x, gates, z, A if ctx.needs_input_grad[0] else None, B)
        return shaped(y, (*x.shape[:-1], B.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, gates, z, A, B = ctx.saved_tensors
        E, R, _ = ctx.A[0]
        gy2, x2 = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
        g3, z3 = gates.reshape(-1, E, 1).to(gy.dtype), z.view(-1, E, R)
        gh = (gy2 @ _stacked(B).to(gy.dtype).t()).mul_(ctx.scale).view(-1, E, R)
        dB = (((z3 * g3).flatten(1).t() @ gy2).mul_(ctx.scale).view(E, R, -1).transpose(1, 2)
              .to(B.dtype)) if ctx.needs_input_grad[3] else None
        dgates = (gh * z3).sum(-1).view(gates.shape).to(gates.dtype)
        gz = (gh * g3).flatten(1)
        dA = (gz.t() @ _again(ctx.mask, x2)).view(ctx.A[0]).to(ctx.A[1]) \
            if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _again(ctx.mask, gz @ A.flatten(0, 1).to(gz.dtype)).view(x.shape)
        return dx, dgates, dA, dB, None, None


def _weighed(x: Tensor, gates: Tensor, A: Tensor, B: Tensor, scale: float,
             p: float) -> tuple[Tensor, Tensor]:
    """(y (N, O), z (N, E R) before the gates), by differentiable torch functions alone."""
    E, R, _ = A.shape
    x2, g2 = x.reshape(-1, x.shape[-1]), gates.reshape(-1, E).to(x.dtype)
    z = F.linear(F.dropout(x2, p, True) if p else x2, A.flatten(0, 1).to(x.dtype))
    h = (z.view(-1, E, R) * g2.unsqueeze(-1)).flatten(1)
    return (h @ _stacked(B).to(x.dtype)).mul_(scale), z


def _stacked(B: Tensor) -> Tensor:
    """(E, O, R) as (E R, O)."""
    return B.transpose(1, 2).flatten(0, 1)


def _again(mask: Mask | None, t: Tensor) -> Tensor:
    """`t` under the mask of the forward."""
    return t if mask is None else mask(t)


def spread(y: Tensor, rows: tuple[tuple[int, int], ...] | None, out: int) -> Tensor:
    """y where a fused linear of so many outputs has these runs of rows, 0 elsewhere; y itself where
    rows is None."""
    if rows is None:
        return y
    whole = y.new_zeros(*y.shape[:-1], out)
    for (a, b), piece in zip(rows, y.split([b - a for a, b in rows], -1), strict=True):
        whole[..., a:b] = piece
    return whole


# -- routing --------------------------------------------------------------------------------------
def top_k(probability: Tensor, k: int) -> Tensor:
    """The k largest of each row, divided by their sum; 0 elsewhere. (..., E)"""
    value, index = probability.topk(k, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    return torch.zeros_like(probability).scatter(-1, index, value)


def balance(probability: Tensor, gates: Tensor, valid: Tensor | None = None) -> Tensor:
    """Switch balance loss ``E sum_e f_e P_e``: 1 for a uniform router.

    f_e: share of the (token, slot) pairs sent to e, no gradient. P_e: mean probability of e.
    valid: mask (...,) of tokens that count; padding must not.
    """
    p, sent = probability.flatten(0, -2), (gates.detach() > 0).flatten(0, -2).to(probability.dtype)
    if valid is not None:
        m = valid.reshape(-1, 1).to(p.dtype)
        p, sent = p * m, sent * m
        tokens = m.sum().clamp_min(1)
    else:
        tokens = p.shape[0]
    f = sent.sum(0) / sent.sum().clamp_min(1)
    return p.shape[-1] * (f * p.sum(0) / tokens).sum()


def counted(x: Tensor) -> Tensor | None:
    """Which of the tokens x (batch, tokens, ...), or of a flattened batch (batch * tokens, ...),
    count in the call under way; None: all of them."""
    valid = context().valid
    if valid is not None and x.dim() == 2 and valid.numel() == len(x):
        valid = valid.flatten()
    return valid if valid is not None and valid.shape == x.shape[:-1] else None


def localised(p: Tensor, kind: Tensor, pull: float, valid: Tensor | None = None,
              form: Literal["cv2", "mean"] = "cv2") -> Tensor:
    """Imbalance of ``Z = I * Q`` over samples and experts, where the first half of the experts is
    for samples of kind 1 and the second for kind 0.

    p: (B, ..., E) weights of the experts. kind: (B,). Q (B, E) is the sum of p over the tokens,
    those of `valid` (B, ...) alone; I is 1 + pull where half and kind agree, else 1 - pull.
    "cv2": Var(Z) / (Mean(Z)^2 + 1e-10), "mean": Var(Z) / Mean(Z), Var unbiased.
    """
    w = p if valid is None else p * valid.unsqueeze(-1).to(p.dtype)
    Q = w.reshape(len(p), -1, p.shape[-1]).sum(1)
    first = torch.arange(p.shape[-1], device=p.device) < p.shape[-1] // 2
    same = (first == (kind == 1).unsqueeze(1)).to(Q.dtype)
    Z = Q * (1 + pull * (2 * same - 1))
    return Z.var() / (Z.mean() ** 2 + 1e-10 if form == "cv2" else Z.mean())


class ExpertChains(nn.Module):
    """``y = s sum_{e in top-k} g_e B_e A_e drop(x)``, g renormalised softmax(W_r x) in fp32.

    A (E, R, I) Kaiming-uniform(sqrt 5), B (E, O, R) zero, router W_r (E, I) Kaiming-uniform:
    E (R (I + O) + I) numbers; zero at the start. k is cut to E.
    rows: runs of outputs that are adapted when the linear is fused; None for all.
    """

    def __init__(self, inp: int, out: int, experts: int, rank: int, k: int, *, scale: float = 1.0,
                 dropout: float = 0.0, coefficient: float = 0.0,
                 rows: tuple[tuple[int, int], ...] | None = None):
        super().__init__()
        self.k, self.scale, self.dropout = min(k, experts), scale, dropout
        self.coefficient, self.out, self.rows = coefficient, out, rows
        n = out if rows is None else sum(b - a for a, b in rows)
        bound = 1 / math.sqrt(inp)
        self.A = nn.Parameter(torch.empty(experts, rank, inp).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(experts, n, rank))
        self.router = nn.Parameter(torch.empty(experts, inp).uniform_(-bound, bound))
        for p in self.parameters():
            p.burnish_decay = False
        self.riding = Riding()                   # alone; attached, the model's

    def attached(self, attacher: Any) -> None:
        """Share the scale of the loss with all of the model."""
        self.riding = attacher.state.riding

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, gates), both (..., E) in fp32."""
        product = _product if transformed() else Product.apply
        p = torch.softmax(product(x, self.router), -1)
        return p, top_k(p, self.k)

    def imbalance(self, p: Tensor, g: Tensor, x: Tensor) -> Tensor:
        """What is minimised beside the task, of the probabilities and gates of x."""
        return balance(p, g, counted(x))

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        p, g = self.gates(x)
        collecting = self.riding.collected is not None
        if self.coefficient and (collecting or self.training and torch.is_grad_enabled()):
            if transformed() and not collecting:
                raise RecipeError("a balance loss rides on backward, which torch.func does not run;"
                                  " set its coefficient to 0 or call eval()")
            g = self.riding.on(g, self.imbalance(p, g, x), self.coefficient)
        given = (x, g, self.A, self.B, self.scale, self.dropout * self.training)
        y = _weighed(*given)[0].view(*x.shape[:-1], -1) if transformed() else Weighed.apply(*given)
        return spread(y, self.rows, self.out)

    def grouped(self, x: Tensor) -> Tensor:
        """The same expert by expert, each on its own tokens, without dropout: the reference."""
        _, g = self.gates(x)
        x2, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        y = x2.new_zeros(len(x2), self.B.shape[1])
        for e in range(len(self.A)):
            mine = (g2[:, e] > 0).nonzero().squeeze(1)
            made = x2[mine] @ self.A[e].t().to(x.dtype) @ self.B[e].t().to(x.dtype)
            y = y.index_add(0, mine, made * g2[mine, e : e + 1].to(x.dtype))
        return (y * self.scale).view(*x.shape[:-1], -1)


class DenseChains(ExpertChains):
    """``y = s sum_e p_e B_e A_e drop(x)``, p = softmax(W_r x): all experts, in two halves that the
    key ``sample_type`` of the batch tells apart (see :func:`localised`)."""

    def __init__(self, inp: int, out: int, experts: int, rank: int, *, pull: float = 0.0,
                 kind: Literal["cv2", "mean"] = "cv2", **kw: Any):
        super().__init__(inp, out, experts, rank, experts, **kw)
        self.pull, self.kind = pull, kind

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p, _ = super().gates(x)
        return p, p

    def imbalance(self, p: Tensor, g: Tensor, x: Tensor) -> Tensor:
        valid = counted(x)
        kinds = torch.as_tensor(context().need("sample_type"), device=p.device).reshape(-1)
        rows = len(p) if len(kinds) == 1 and p.dim() > 2 else len(kinds)
        if len(p) % rows or (len(kinds) == 1 and p.dim() == 2 and len(p) > 1):
            raise RecipeError(f"'sample_type' has {len(kinds)} entries, and a layer is given "
                              f"{len(p)} rows: give one entry per sample")
        if valid is not None:
            valid = valid.reshape(rows, -1)
        return localised(p.reshape(rows, -1, p.shape[-1]), kinds.expand(rows), self.pull, valid,
                         self.kind)
