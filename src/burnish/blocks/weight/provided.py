"""A layer whose weight is provided, and what is added to it.

``y = x V^T + b`` with ``V = provider() + sum of terms``, evaluated by one autograd function that

* keeps the input once, or not at all when no term needs it;
* asks the provider again in backward, so a dequantised or merged weight never lives that long;
* lets each term work on the token side (low rank) or panel by panel over the inputs (generated
  sparse updates), and adds in place, so no second full-width intermediate exists.

Letters: N tokens, O out, I in. A panel is (O, n): all outputs, a run of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...core.call import current
from ..tape.cast import autocast
from ..tape.functions import as_required, shaped, transformed
from ..tape.notes import Seen
from ..tape.roles import reading
from .backward import again, as_then, uncast
from .term import Term, Wrap

#: entries of one panel; a matrix up to this size is a single panel (16 MiB in fp32)
PANEL = 1 << 22


class Panels:
    """V = base + tiles, panel by panel over the inputs; the only place that knows the loop."""

    def __init__(self, weight: Tensor, terms: list[tuple[Term, float]], states: list[Any]):
        self.weight, self.terms, self.states = weight, terms, states
        self.out, self.inp = weight.shape[-2:]

    def ranges(self) -> list[tuple[int, int]]:
        """The runs of inputs, one after the other."""
        whole = any(not t.tiled and not hasattr(t, "cheap_tile") for t, _ in self.terms)
        step = self.inp if whole else max(1, min(self.inp, PANEL // max(1, self.out)))
        return [(i0, min(self.inp, i0 + step)) for i0 in range(0, self.inp, step)]

    def added(self, i0: int, i1: int) -> Tensor | None:
        """What the terms add to columns i0:i1: a fresh panel, in their own precision."""
        panel: Tensor | None = None
        for (term, scale), state in zip(self.terms, self.states, strict=True):
            tile = term.tile(i0, i1, state)
            tile = tile if scale == 1 else tile.mul_(scale)
            panel = tile if panel is None else panel.add_(tile)
        return panel

    def value(self, i0: int, i1: int) -> Tensor:
        """V[:, i0:i1]: a fresh panel, or a view of the base when nothing is added."""
        panel = self.added(i0, i1)
        base = self.weight[..., i0:i1]
        if panel is None:
            return base
        if panel.dtype == base.dtype or panel.element_size() < base.element_size():
            return panel.to(base.dtype).add_(base)
        return panel.add_(base.to(panel.dtype)).to(base.dtype)

    def row_squares(self) -> Tensor:
        """sum_i V[o, i]^2, accumulated in at least fp32."""
        acc = None
        for i0, i1 in self.ranges():
            v = self.value(i0, i1)
            v = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
            part = torch.linalg.vector_norm(v, dim=-1).square_()
            acc = part if acc is None else acc.add_(part)
        return acc


class Weighted:
    """One place's answer: where the base comes from, which terms are added, what wraps them."""

    def __init__(self, base: Any, terms: list[tuple[Term, float]], wrap: Wrap | None = None,
                 held: Callable[[], Sequence[Tensor]] = tuple):
        self.base = base                      # callable -> (out, in) view of the frozen weight
        self.held = held                      # callable -> the tensors that base() reads
        self.terms = terms
        self.wrap = wrap
        self.tiled = [(t, s) for t, s in terms if not t.tokenwise]
        self.token = [(t, s) for t, s in terms if t.tokenwise]
        self.all: list[Term] = [t for t, _ in (*self.tiled, *self.token)]
        self.all += [wrap] if wrap else []

    def unwrapped(self) -> Weighted:
        """The same without the function of W."""
        return Weighted(self.base, self.terms, None, self.held)

    def theta(self) -> list[Tensor]:
        return [p for t in self.all for p in t.theta()]

    @property
    def keeps_input(self) -> bool:
        return any(t.keeps_input for t in self.all)

    def reads(self, need_x: bool, panels: bool, base: bool) -> list[Tensor]:
        """Tensors that backward reads again. panels: it makes V again; base: it asks base()."""
        found = [r for t in self.all for r in t.reads(need_x or panels)]
        return [*found, *self.held()] if base and (need_x or panels) else found

    def check(self, seen: Seen, now: Sequence[Tensor]) -> None:
        """RuntimeError when what backward reads is not what forward saw."""
        def name(k: int) -> str:
            for t in self.all:
                for name, p in (*t.named_parameters(), *t.named_buffers()):
                    if p is now[k]:
                        return f"{name} {tuple(p.shape)} of a {type(t).__name__}"
            return f"what holds a frozen weight {tuple(now[k].shape)}"
        seen.check(now, name)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x V^T + b`` by differentiable torch functions alone: all of it is kept."""
        bias = None if bias is None else bias.to(x.dtype)
        if self.wrap is None:
            y = F.linear(x, weight.to(x.dtype), bias)
            for t, s in self.terms:
                y = y + s * t.plain(x).to(y.dtype)
            return y
        for t, _ in self.terms:
            t.undropped()
        return F.linear(x, self.dense(weight).to(x.dtype), bias)

    # -- the effective weight (convolutions, experts, modules that bypass their children) ----
    def effective(self, weight: Tensor) -> Tensor:
        """(out, in) weight with everything added, differentiable in theta, keeping nothing."""
        theta = self.theta()
        return self.dense(weight) if _plainly(theta) else _Effective.apply(weight, self, *theta)

    def dense(self, weight: Tensor) -> Tensor:
        """The same by the obvious route: the reference, and what merge writes."""
        V = weight
        for t, s in self.terms:
            V = V + s * t.dense().to(V.dtype)
        return self.wrap.of(V) if self.wrap else V


class _Effective(torch.autograd.Function):
    """W -> f(W + sum of terms), regenerated in backward. Keeps O(out) numbers."""

    @staticmethod
    @uncast
    def forward(ctx: Any, weight: Tensor, op: Weighted, *theta: Tensor) -> Tensor:
        ctx.op, ctx.call = op, current()
        # V itself is read again only by what wraps it
        ctx.stored = op.wrap is not None and _is_stored(weight)
        ctx.save_for_backward(weight if ctx.stored else None)
        ctx.seen = _seen(op, True, True, not ctx.stored)
        if op.wrap is not None and not op.wrap.diagonal:
            return op.dense(weight)
        ctx.states = [t.prepare() for t, _ in op.terms]
        V = Panels(weight, op.terms, ctx.states)
        y = torch.empty_like(weight)
        if op.wrap is not None:
            ctx.f, ctx.kept = op.wrap.gains(V)
        for i0, i1 in V.ranges():
            y[..., i0:i1] = V.value(i0, i1)
        if op.wrap is not None:
            y.mul_(ctx.f.unsqueeze(-1))           # the factor stays wide: one rounding
        return y

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        op: Weighted = ctx.op
        if ctx.seen is None:
            return _Effective.pulled(ctx, op, G)
        with as_required(op.theta(), ctx.needs_input_grad[2:]):
            op.check(ctx.seen, op.reads(True, True, not ctx.stored))
            return _Effective.pulled(ctx, op, G)

    @staticmethod
    def pulled(ctx: Any, op: Weighted, G: Tensor) -> tuple[Any, ...]:
        (stored,) = ctx.saved_tensors
        weight = G if op.wrap is None else op.base() if stored is None else stored
        if op.wrap is not None and not op.wrap.diagonal:
            theta, need_w = op.theta(), ctx.needs_input_grad[0]
            weight = weight.detach().requires_grad_(need_w)
            with torch.enable_grad():
                W = op.dense(weight)
                wanted = [t for t in (weight, *theta) if t.requires_grad]
                got = iter(torch.autograd.grad(W, wanted, G, allow_unused=True))
            dW = next(got) if need_w else None
            return dW, None, *[next(got) if t.requires_grad else None for t in theta]
        grads = {id(t): [None] * len(t.theta()) for t in op.all}
        V = Panels(weight, op.terms, ctx.states)
        df = None
        for i0, i1 in V.ranges():
            part = G[..., i0:i1]
            if op.wrap is not None:
                v = V.value(i0, i1)
                d = (part * v).sum(-1, dtype=ctx.f.dtype)
                df = d if df is None else df.add_(d)
                part = _gained(part, ctx.f.unsqueeze(-1))
            for (t, s), state in zip(op.terms, ctx.states, strict=True):
                t.pull(i0, i1, part if s == 1 else part * s, state, grads[id(t)])
        if op.wrap is not None:
            grads[id(op.wrap)] = op.wrap.pull_gains(df, ctx.kept)
        dW = None
        if ctx.needs_input_grad[0]:
            dW = G if op.wrap is None else _gained(G, ctx.f.unsqueeze(-1))
        return dW, None, *[g for t in op.all for g in grads[id(t)]]


def linear(x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """``y = x V^T + b`` for x of shape (..., in).

    weight: pass the stored (out, in) parameter itself when it trains too, else None.
    """
    x = autocast(x)
    theta = op.theta()
    if _plainly(theta):
        return op.plain(x, op.base() if weight is None else weight, bias)
    if op.wrap is not None and not op.wrap.diagonal:
        if (turned := op.wrap.linear(x, op, bias, weight)) is not None:
            return turned
        return _remade(x, op, bias, weight)
    if torch.compiler.is_compiling():
        return _Linear.apply(x, weight, bias, op, *theta)
    with reading((x,)):
        return _Linear.apply(x, weight, bias, op, *theta)


def _remade(x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """``x W'^T + b`` for any function of W: W' is formed again in backward, never kept."""
    def product(x: Tensor) -> Tensor:
        return F.linear(x, op.dense(op.base() if weight is None else weight).to(x.dtype))

    y = again(product, x, (*op.theta(), *(op.held() if weight is None else (weight,))))
    return y if bias is None else y + bias.to(y.dtype)


def _plainly(theta: Sequence[Tensor]) -> bool:
    """Must the differentiable form run: under a transform, or on tensors that somebody has put in
    the place of parameters for one call (``torch.func.functional_call``)?"""
    return transformed() or not all(isinstance(t, nn.Parameter) for t in theta)


def _seen(op: Weighted, need_x: bool, panels: bool, base: bool) -> Seen | None:
    """What backward will read again, as it is now. A compiled graph takes it in as its inputs."""
    return None if torch.compiler.is_compiling() else Seen(op.reads(need_x, panels, base))


def _is_stored(weight: Tensor) -> bool:
    """Is it, or is it a view of, a parameter some module owns? Keeping it costs nothing."""
    return not torch.compiler.is_compiling() and isinstance(
        weight._base if weight._is_view() else weight, nn.Parameter)


class _Linear(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                op: Weighted, *theta: Tensor) -> Tensor:
        stored = op.base() if weight is None else weight
        W = stored if stored.dtype == x.dtype else stored.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        x2 = x.reshape(-1, x.shape[-1])
        ctx.states = [t.prepare() for t, _ in op.tiled]
        early = None if op.wrap else b          # a wrapped weight's bias is not scaled
        # in half precision the product waits unrounded for its gain: on the grid of rounded
        # numbers a gain of 1.002 would change nothing
        wide = op.wrap is not None and x2.element_size() < 4
        y2 = _product(x2, Panels(W, op.tiled, ctx.states), early, wide)
        kept: list[Any] = []
        for t, s in op.token:
            kept.append(t.forward_(x2, y2, s))
        ctx.gain = None
        if op.wrap is not None:
            states = ctx.states + [t.prepare() for t, _ in op.token]
            f, ctx.wrap_kept = op.wrap.gains(Panels(W, op.tiled + op.token, states))
            ctx.gain = f
            y2.mul_(f)
            if b is not None:
                y2.add_(b)
        ctx.op, ctx.call, ctx.shape = op, current(), x.shape
        # as in stock torch: what backward reads is kept or watched, and nothing else
        panels = op.wrap is not None and op.wrap.keeps_input
        reads_w = ctx.needs_input_grad[0] or panels
        keep_w = reads_w and (weight is not None or _is_stored(stored))
        ctx.seen_as = ctx.needs_input_grad[0], panels, not keep_w
        ctx.seen = _seen(op, *ctx.seen_as)
        ctx.keeps = [t.keeps_input for t, _ in op.tiled], panels
        ctx.weight = stored.dtype, stored.shape
        keep_x = op.keeps_input or ctx.needs_input_grad[1]
        tensors = [x if keep_x else None, stored if keep_w else None]
        ctx.layout = []
        for part in kept:
            ctx.layout.append([len(tensors) + i if isinstance(p, Tensor) else p
                               for i, p in enumerate(part)])
            ctx.layout[-1] = [(True, v) if isinstance(p, Tensor) else (False, p)
                              for v, p in zip(ctx.layout[-1], part, strict=True)]
            tensors += part
        ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in tensors])
        return shaped(y2.to(x.dtype), (*x.shape[:-1], y2.shape[-1]))

    @staticmethod
    @once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        op: Weighted = ctx.op
        if ctx.seen is None:
            return _Linear.pulled(ctx, op, g)
        with as_required(op.theta(), ctx.needs_input_grad[4:]):
            op.check(ctx.seen, op.reads(*ctx.seen_as))
            return _Linear.pulled(ctx, op, g)

    @staticmethod
    def pulled(ctx: Any, op: Weighted, g: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        x, stored = saved[0], saved[1]
        kept = [tuple(saved[v] if isT else v for isT, v in part) for part in ctx.layout]
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        g2 = g.reshape(-1, g.shape[-1])
        x2 = None if x is None else x.reshape(-1, x.shape[-1])
        keeps, panels = ctx.keeps
        if need_x or panels:
            W = op.base() if stored is None else stored
            W = W if W.dtype == g2.dtype else W.to(g2.dtype)
        else:                                    # only its shape is asked
            W = g2.new_empty(()).expand(ctx.weight[1])
        db = g2.sum(0) if need_b else None
        grads: dict[int, list[Tensor | None]] = {id(t): [None] * len(t.theta()) for t in op.all}
        if op.wrap is not None:
            if panels:
                own = [t.gain_(g2, part, s) for (t, s), part in zip(op.token, kept, strict=True)]
                whole = [ts for ts, d in zip(op.token, own, strict=True) if d is None]
                states = ctx.states + [t.prepare() for t, _ in whole]
                V = Panels(W, op.tiled + whole, states)
                df = torch.zeros_like(ctx.gain)
                for d in own:
                    df += 0 if d is None else d
                for i0, i1 in V.ranges():
                    df += ((g2.t() @ x2[:, i0:i1]) * V.value(i0, i1)).sum(-1, dtype=df.dtype)
                grads[id(op.wrap)] = op.wrap.pull_gains(df, ctx.wrap_kept)
            g2 = _gained(g2, ctx.gain)
        V = Panels(W, op.tiled, ctx.states)
        dx = _product_back(g2, x2, V, grads, need_x, keeps)
        for (t, s), part in zip(op.token, kept, strict=True):
            grads[id(t)] = t.backward_(g2, x2, part, dx, s)
        dW = (g2.t() @ x2).to(ctx.weight[0]) if need_w else None
        flat = [p for t in op.all for p in grads[id(t)]]
        return (None if dx is None else dx.view(ctx.shape)), dW, db, None, *flat


def _gained(t: Tensor, f: Tensor) -> Tensor:
    """t f in t's precision, multiplied in the wider of both and rounded once."""
    return torch.mul(t, f, out=torch.empty_like(t))


def _mm(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a b, with `wide` for half precision in fp32 as it is accumulated."""
    if not wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _product(x2: Tensor, V: Panels, bias: Tensor | None, wide: bool = False) -> Tensor:
    """x V^T + b; one product when V is a single panel.

    In half precision base and update are products of their own: added to the weight first, what
    is below half its spacing would be lost.
    """
    ranges = V.ranges()
    if wide or V.terms and x2.element_size() < 4:
        y = _mm(x2, V.weight.t(), True) if wide else F.linear(x2, V.weight, bias)
        for i0, i1 in ranges if V.terms else ():
            added = V.added(i0, i1).to(x2.dtype).t()
            y = y.add_(_mm(x2[:, i0:i1], added, True)) if wide else \
                y.addmm_(x2[:, i0:i1], added)
        return y
    if len(ranges) == 1 or not V.terms:
        return F.linear(x2, V.value(0, V.inp), bias)
    y = x2.new_empty(x2.shape[0], V.out)
    for k, (i0, i1) in enumerate(ranges):
        panel = V.value(i0, i1).t()
        if k == 0:
            torch.mm(x2[:, i0:i1], panel, out=y)
        else:
            y.addmm_(x2[:, i0:i1], panel)
    return y if bias is None else y.add_(bias)


def _product_back(g2: Tensor, x2: Tensor | None, V: Panels, grads: dict[int, list[Tensor | None]],
                  need_x: bool, keeps: list[bool]) -> Tensor | None:
    """dx = g V, and the pull of every tiled term from its panel of g^T x."""
    if not V.terms:
        return g2 @ V.weight if need_x else None
    half = g2.element_size() < 4                 # as in _product: two products
    dx = None
    if need_x:
        dx = g2 @ V.weight if half else g2.new_empty(g2.shape[0], V.inp)
    for i0, i1 in V.ranges():
        total: Tensor | None = None
        G = None
        if any(keeps):
            G = (x2[:, i0:i1].t() @ g2).t()
        for (t, s), state, pulls in zip(V.terms, V.states, keeps, strict=True):
            if pulls:
                tile = t.pull(i0, i1, G if s == 1 else G * s, state, grads[id(t)])
            else:
                tile = t.tile(i0, i1, state)
            if need_x:
                total = tile * s if total is None else total.add_(tile, alpha=s)
        if not need_x:
            continue
        if half:
            dx[:, i0:i1].addmm_(g2, total.to(g2.dtype))
            continue
        panel = V.weight[..., i0:i1]
        total = total.add_(panel) if total.dtype == panel.dtype else \
            (total + panel).to(panel.dtype)
        torch.mm(g2, total, out=dx) if i1 - i0 == V.inp else dx[:, i0:i1].copy_(g2 @ total)
    return dx
