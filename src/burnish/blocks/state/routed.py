"""An MLP whose inner channels fall into experts, of which a router takes a few for each token.

    p = sigmoid(W_r x + b_r)        c_e = 2 p_e, e among the k largest
    h_e = act(c_e (W1_e x + b1_e) + D1_e x)        y = sum_e (c_e W2_e h_e + D2_e h_e) + b2

W1_e: the rows of the first matrix (gate and up alike) of expert e's channels, W2_e those columns
of the last; D: what adapters add to these, as factors. c = 1 and all experts: the MLP itself.

Tokens stand expert by expert from the first product to the last: N k rows of F / E channels, of
which the activation between knows nothing. A product is one per expert, on the rows that are its.
Kept for backward: x, N k (F / E) inner numbers (as N F of the whole MLP), R numbers per token, 4 E
bytes per token of the routing; weights are read again.

Letters: N tokens, M = N k rows, I width in, F inner channels, f = F / E, E experts, R rank, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.followed import simulated
from ..tape.cast import autocast, uncast
from ..tape.functions import applied, once_differentiable, transformed
from .prompts import Listener

#: what gives a matrix (out, in)
Matrix = Callable[[], Tensor]


@dataclass(eq=False)
class Routing:
    """of: the state that was routed. order (M,): the (token, choice) pair of each row, expert by
    expert; ends: where an expert's rows begin, and their number. c (M, 1): what the first products
    are multiplied by, 2 p of each row; last: what the last one is, None: c. channels (F,): those
    of the experts, expert by expert; None: they are runs."""

    of: Tensor
    order: Tensor
    token: Tensor
    ends: Sequence[int]
    c: Tensor
    k: int
    last: Tensor | None = None
    channels: Tensor | None = None

    def pieces(self, W: Tensor, dim: int) -> Iterable[Tensor]:
        """Expert by expert its rows (dim 0) or columns of a matrix, one copy at a time."""
        if self.channels is None:
            return W.chunk(self.experts, dim)
        return (W.index_select(dim, own) for own in self.channels.chunk(self.experts))

    def put(self, W: Tensor, dim: int, values: Iterable[Tensor]) -> Tensor:
        """W with these in the place of its pieces."""
        if self.channels is None:
            for to, value in zip(W.chunk(self.experts, dim), values, strict=True):
                to.copy_(value)
        else:
            for own, value in zip(self.channels.chunk(self.experts), values, strict=True):
                W.index_copy_(dim, own, value.to(W.dtype))
        return W

    @property
    def experts(self) -> int:
        return len(self.ends) - 1

    def back(self, rows: Tensor) -> Tensor:
        """(M, ...) summed by token: (N, ...), in the same order whatever the device."""
        whole = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return whole.view(-1, self.k, rows.shape[-1]).sum(1)


def routed(x: Tensor, router: nn.Linear, k: int) -> Routing:
    """Who takes which rows of x (..., I). On a simulated device all experts take as many."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x2 = x.reshape(-1, x.shape[-1]).to(wide)
    with uncast(x):
        p = torch.sigmoid(F.linear(x2, router.weight.to(wide), router.bias.to(wide)))
    value, index = p.topk(k, -1)
    return dealt(x, index, p.shape[-1], 2 * value)


def dealt(x: Tensor, index: Tensor, experts: int, c: Tensor | None, last: Tensor | None = None
          ) -> Routing:
    """The rows of x (..., I) for the experts of each token, index (N, k). c, last (N, k): see
    :class:`Routing`; None: 1, and c."""
    k, flat = index.shape[-1], index.flatten()
    order = flat.argsort(stable=True)
    each = (flat.unsqueeze(1) == torch.arange(experts, device=x.device)).sum(0).cumsum(0)
    ends = [len(flat) * e // experts for e in range(1, experts + 1)] if simulated(x) \
        else each.tolist()

    def rows(of: Tensor) -> Tensor:
        return of.flatten().index_select(0, order).unsqueeze(1)

    ones = x.new_ones(len(flat), 1) if c is None else rows(c)
    return Routing(x, order, order // k, [0, *ends], ones, k, None if last is None else rows(last))


def _parts(x: Tensor, weights: Iterable[Tensor], ends: Sequence[int]) -> Tensor:
    """Row by row the product with its expert's matrix (in, out): (M, out)."""
    y: Any = None
    for W, (a, b) in zip(weights, pairwise(ends), strict=True):
        y = x.new_empty(len(x), W.shape[1]) if y is None else y
        torch.mm(x[a:b], W.to(x.dtype), out=y[a:b])
    return y


def _sums(g: Tensor, x: Tensor, ends: Sequence[int], into: Sequence[Tensor]) -> None:
    """Expert by expert g^T x, written into these."""
    for y, (a, b) in zip(into, pairwise(ends), strict=True):
        y.copy_(g[a:b].t() @ x[a:b])


def _outer(g: Tensor, x: Tensor, ends: Sequence[int]) -> Iterable[Tensor]:
    """Expert by expert g^T x."""
    return (g[a:b].t() @ x[a:b] for a, b in pairwise(ends))


class _Up(torch.autograd.Function):
    """(M, f) of x (N, I): ``c (W_e x + b_e) + B_e A x``. W (F, I), A (R, I), B (F, R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, bias: Tensor | None, A: Tensor | None,
                B: Tensor | None, matrix: Matrix, r: Routing, W: Tensor | None) -> Tensor:
        y = _parts(x[r.token], (w.t() for w in r.pieces(matrix(), 0)), r.ends)
        if bias is not None:
            for b, (i, j) in zip(bias.chunk(r.experts), pairwise(r.ends), strict=True):
                y[i:j] += b.to(y.dtype)
        y.mul_(c)
        z = None
        if A is not None and B is not None:
            z = x @ A.t().to(x.dtype)
            y += _parts(z[r.token], [b.t() for b in B.chunk(r.experts)], r.ends)
        ctx.matrix, ctx.r = matrix, r
        ctx.save_for_backward(x, c, bias, A, B, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, c, bias, A, B, z = ctx.saved_tensors
        r, needs = ctx.r, ctx.needs_input_grad
        own = _parts(g, r.pieces(ctx.matrix(), 0), r.ends)                   # W_e^T g
        dc = (own * x[r.token]).sum(-1, keepdim=True) if needs[1] else None
        db = None
        if bias is not None:
            if dc is not None:
                dc += _parts(g, [b.unsqueeze(1) for b in bias.chunk(r.experts)], r.ends)
            if needs[2]:
                db, gc = torch.empty_like(bias), g * c
                for to, (i, j) in zip(db.chunk(r.experts), pairwise(r.ends), strict=True):
                    to.copy_(gc[i:j].sum(0))
        dx = r.back(own.mul_(c)) if needs[0] else None
        dc = None if dc is None else dc.to(c.dtype)
        dW = r.put(torch.empty_like(ctx.matrix()), 0, _outer(g * c, x[r.token], r.ends)) \
            if needs[7] else None
        if z is None:
            return dx, dc, db, None, None, None, None, dW
        dB = torch.empty_like(B)
        _sums(g, z[r.token], r.ends, dB.chunk(r.experts))
        dz = r.back(_parts(g, B.chunk(r.experts), r.ends))
        if dx is not None:
            dx += dz @ A.to(dz.dtype)
        return dx, dc, db, (dz.t() @ x).to(A.dtype), dB, None, None, dW


class _Down(torch.autograd.Function):
    """(N, O) of h (M, f): ``sum_e (c W_e h + B A_e h) + b``. W (O, F), A (R, F), B (O, R)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, c: Tensor, bias: Tensor | None, A: Tensor | None,
                B: Tensor | None, matrix: Matrix, r: Routing, W: Tensor | None) -> Tensor:
        y = r.back(_parts(h, (w.t() for w in r.pieces(matrix(), 1)), r.ends).mul_(c))
        if bias is not None:
            y += bias.to(y.dtype)
        z = None
        if A is not None and B is not None:
            z = r.back(_parts(h, [a.t() for a in A.chunk(r.experts, 1)], r.ends))
            y += z @ B.t().to(z.dtype)
        ctx.matrix, ctx.r = matrix, r
        ctx.save_for_backward(h, c, bias, A, B, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        h, c, bias, A, B, z = ctx.saved_tensors
        r, needs = ctx.r, ctx.needs_input_grad
        dh = _parts(g[r.token], r.pieces(ctx.matrix(), 1), r.ends)           # W_e^T g
        dc = (dh * h).sum(-1, keepdim=True).to(c.dtype) if needs[1] else None
        dh.mul_(c)
        db = g.sum(0).to(bias.dtype) if bias is not None and needs[2] else None
        dW = r.put(torch.empty_like(ctx.matrix()), 1, _outer(g[r.token] * c, h, r.ends)) \
            if needs[7] else None
        if z is None:
            return dh, dc, db, None, None, None, None, dW
        dz = (g @ B.to(g.dtype))[r.token]
        dA = torch.empty_like(A)
        _sums(dz, h, r.ends, dA.chunk(r.experts, 1))
        dh += _parts(dz, A.chunk(r.experts, 1), r.ends)
        return dh, dc, db, dA, (g.t() @ z).to(B.dtype), None, None, dW


class Routed(Listener):
    """Answers for a first linear of an MLP, whose output is rows expert by expert, or for the last,
    which makes tokens of them again.

    key: of the MLP, shared by its listeners. router: of the one that runs first, (I -> E). slot:
    what stands at the linear (``slot.pairs``). k: experts of a token.
    """

    what = "a routed MLP"
    part = "routed_ffn"
    #: may weights that train whole be divided?
    whole = False

    def __init__(self, state: Any, adapter: str, slot: Any, key: str, last: bool, k: int = 0,
                 router: nn.Linear | None = None, part: str = part):
        super().__init__(state, adapter)
        self.part = part
        self.__dict__["slot"] = slot              # of the module that owns this one
        self.key, self.last, self.k, self.router = key, last, k, router

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if transformed():
            raise RecipeError(f"{self.part}: where tokens go is decided by their values, which "
                              "torch.func does not transform")
        given = args[0] if args else next(iter(kw.values()))
        matrix, A, B = self.slot.pairs(module, self.here.active, self.part, self.whole)
        box, name = self.here.box, (self.part, self.key)
        bias: Tensor | None = module.bias         # type: ignore[assignment]
        x = autocast(given)
        if not self.last:
            r = box.get(name)
            if r is None or r.of is not given:
                if not self.routes:
                    raise RecipeError(f"{self.part}: {self.slot.path} ran before the linear that "
                                      f"routes {self.key}, or on another state")
                r = box[name] = self.route(given)
            return self._applied(_Up, x.reshape(-1, x.shape[-1]), bias, A, B, matrix, r)
        r = box.pop(name, None)
        if r is None or x.shape[:-1] != r.order.shape:
            raise RecipeError(f"{self.part}: {self.slot.path} was given {tuple(x.shape)}, no rows "
                              f"of its experts: {self.key} does more between its linears than an "
                              "activation")
        y = self._applied(_Down, x, bias, A, B, matrix, r)
        return y.view(*r.of.shape[:-1], y.shape[-1])

    def _applied(self, function: Any, x: Tensor, bias: Tensor | None, A: Tensor | None,
                 B: Tensor | None, matrix: Matrix, r: Routing) -> Tensor:
        c = r.last if self.last and r.last is not None else r.c
        trains = W if self.whole and (W := matrix()).requires_grad else None
        if r.channels is not None:               # as the experts have them
            bias = bias if bias is None or self.last else bias[r.channels]
            A = A if A is None or not self.last else A[:, r.channels]
            B = B if B is None or self.last else B[r.channels]
        with uncast(x):
            return applied(function, x, c.to(x.dtype), bias, A, B, matrix, r, trains)

    @property
    def routes(self) -> bool:
        """Does it say which experts take which rows?"""
        return self.router is not None

    def route(self, x: Tensor) -> Routing:
        """Which experts take which rows of x."""
        assert self.router is not None
        return routed(x, self.router, self.k)
