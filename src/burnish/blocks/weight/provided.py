"""A layer whose weight is provided, and what is added to it.

``y = x V^T + b`` with ``V = provider() + sum of terms``, evaluated by one autograd function that

* keeps the input once, or not at all when no term needs it;
* asks the provider again in backward, so a dequantised or merged weight never lives that long;
* lets each term work on the token side (low rank) or panel by panel over the inputs (generated
  sparse updates), and adds in place, so no second full-width intermediate exists.

Letters: N tokens, O out, I in. A panel is (O, n): all outputs, a run of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.call import current
from ...core.followed import compiling
from .. import matmul
from ..gpu.coded import Coded
from ..tape import cast, functions, unread
from ..tape.activations import strips
from ..tape.functions import applied, as_required, is_stored, plainly, shaped, unwatched
from ..tape.notes import Seen
from ..tape.roles import reading
from .backward import as_then, through, uncast
from .base import Base
from .dropped import Dropped, Dropping, stands_beside
from .folded import NOTHING, Fold, Made, Room
from .panels import Panels, Piece, product, product_back, product_beside
from .term import Term, Wrap


class Weighted:
    """One place's answer: where the base comes from, which terms are added, what wraps them."""

    def __init__(self, base: Any, terms: list[tuple[Term, float]], wrap: Wrap | None = None,
                 held: Callable[[], Sequence[Tensor]] = tuple, room: Room | None = None,
                 coded: Callable[[Tensor], Coded | None] | None = None):
        self.base = base                      # callable -> (out, in) view of the frozen weight
        self.coded = coded                    # of tokens -> the same as it is held, or None
        self.held = held                      # callable -> the tensors that base() reads
        self.terms = terms
        self.wrap = wrap
        self.tiled = [(t, s) for t, s in terms if not t.tokenwise]
        self.token = [(t, s) for t, s in terms if t.tokenwise]
        self.all: list[Term] = [t for t, _ in (*self.tiled, *self.token)]
        self.all += [wrap] if wrap else []
        self._may_drop = any(isinstance(getattr(t, "term", t), Dropping) for t in self.all)
        #: what evaluation keeps: of a linear, and of the effective weight; None: nothing to keep
        self.fold = Fold(room) if room is not None and (self.tiled or wrap) else None
        self.whole = Fold(room) if room is not None else None
        self.room = room
        self._unwrapped: Weighted | None = None

    @property
    def unwrapped(self) -> Weighted:
        """The same without the function of W."""
        if self._unwrapped is None:              # (a cached_property locks: no graph holds that)
            self._unwrapped = Weighted(self.base, self.terms, None, self.held, self.room,
                                       self.coded)
        return self._unwrapped

    def made(self, x: Tensor) -> Made:
        """What evaluation has kept of it, for an input like x."""
        return NOTHING if self.fold is None else self.fold.now((self,), x)

    def prepared(self) -> list[Any]:
        """What the tiled terms know of their whole matrices."""
        return [t.prepare() for t, _ in self.tiled]

    def run(self, x: Tensor) -> Weighted:
        """This answer for one forward on x: a generated update that drops stands beside W."""
        if not self._may_drop:
            return self
        own = [(Dropped(t, x) if stands_beside(t) else t, s) for t, s in self.terms]
        if all(a is b for (a, _), (b, _) in zip(own, self.terms, strict=True)):
            return self
        return Weighted(self.base, own, self.wrap, self.held,        # type: ignore[arg-type]
                        coded=self.coded)

    def frozen(self, like: Tensor) -> Tensor | Coded:
        """The base, as products with such tokens take it."""
        coded = None if self.coded is None else self.coded(like)
        return self.base() if coded is None else coded

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
        for t in self.all:
            t.undropped()
        return F.linear(x, self.dense(weight).to(x.dtype), bias)

    # -- the effective weight (convolutions, experts, modules that bypass their children) ----
    def effective(self, weight: Tensor) -> Tensor:
        """(out, in) weight with everything added, differentiable in theta, keeping nothing."""
        theta = self.theta()
        return self.dense(weight) if plainly(theta) else applied(_Effective, weight, self, *theta)

    def dense(self, weight: Tensor, final: bool = False) -> Tensor:
        """The same by the obvious route: the reference, and (`final`) what merge writes."""
        V = weight
        for t, s in self.terms:
            V = V + s * (t.final() if final else t.dense()).to(V.dtype)
        return self.wrap.of(V) if self.wrap else V


class _Effective(torch.autograd.Function):
    """W -> f(W + sum of terms), regenerated in backward. Keeps O(out) numbers."""

    @staticmethod
    @uncast
    def forward(ctx: Any, weight: Tensor, op: Weighted, *theta: Tensor) -> Tensor:
        ctx.op, ctx.call = op, current()
        # V itself is read again only by what wraps it
        ctx.stored = op.wrap is not None and is_stored(weight)
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
    @functions.once_differentiable
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
    given, x = x, cast.autocast(x)
    theta = op.theta()
    if plainly(theta):
        return op.plain(x, op.base() if weight is None else weight, bias)
    if op.wrap is not None:
        if (turned := op.wrap.linear(x, op, bias, weight)) is not None:
            return turned
        if not op.wrap.diagonal:
            return _remade(x, op, bias, weight)
    return straight(given, x, op, bias, weight)


def straight(given: Tensor, x: Tensor, op: Weighted, bias: Tensor | None,
             weight: Tensor | None = None) -> Tensor:
    """The same by one function of base and terms, a diagonal function of W around them.

    given: x as the module was given it, before it was cast."""
    theta = op.theta()
    if (now := op.run(given)) is not op:
        op, theta = now, now.theta()
    graph = torch.is_grad_enabled()
    if compiling():                              # (a graph cannot hold the function without grad)
        return _Linear.apply(x, weight, bias, op, False, *theta) if graph else \
            _alone(x, op, bias, weight)
    left = unread.begin()
    with unwatched():
        if graph:
            with reading((x,)):
                y = _Linear.apply(x, weight, bias, op, left, *theta)
        else:
            y = _alone(x, op, bias, weight)
    unread.end()
    return y


def _remade(x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """``x W'^T + b`` for any function of W: W' is formed again in backward, never kept."""
    made, dtype = op.made(x), x.dtype            # of what waits for backward only the node holds x

    def whole() -> Tensor:
        return op.dense(op.base() if weight is None else weight).to(dtype)

    size = made.small("entries", lambda: op.base().numel()) if made is not NOTHING else 0
    with torch.no_grad():
        W = made.large("weight", size * x.element_size(), whole)
    y = through(x, W, whole, (*op.theta(), *(op.held() if weight is None else (weight,))))
    return y if bias is None else y + bias.to(y.dtype)


def _seen(op: Weighted, need_x: bool, panels: bool, base: bool) -> Seen | None:
    """What backward will read again, as it is now. A compiled graph takes it in as its inputs."""
    return None if compiling() else Seen(op.reads(need_x, panels, base))


class _Ran(NamedTuple):
    """A forward: the result (N, O), the base where it was asked for, and what was made on the
    way: states of tiled terms, what token terms keep, the gain and what that keeps."""

    y: Tensor
    base: Base
    states: list[Any]
    kept: list[Any]
    gain: Tensor | None
    wrap_kept: Any


def _run(x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None,
         made: Made = NOTHING, left: bool = False) -> _Ran:
    """``x V^T + b``, with what is made of the weight taken from `made`, or left there.

    left: nobody reads the result, so the product with V is left out."""
    base = Base(op, weight, x)
    b = None if bias is None else bias.to(x.dtype)
    x2 = x.reshape(-1, x.shape[-1])
    half = x2.element_size() < 4
    early = None if op.wrap else b              # a wrapped weight's bias is not scaled
    # in half precision the product waits unrounded for its gain: on the grid of rounded
    # numbers a gain of 1.002 would change nothing
    wide = op.wrap is not None and half
    states: list[Any] | None = []
    pieces: Iterable[Piece] = ()
    if op.tiled:
        found = made.large("panels", _size(op, base, x2, made), lambda: list(
            Panels(base.value, op.tiled, op.prepared()).pieces(half)))
        if found is None:
            states = made.found("states")
            if states is None:
                with made.making():
                    states = op.prepared()
            found = Panels(base.value, op.tiled, states).pieces(half)
        pieces = found
    if left:
        y2 = unread.nothing(x2, base.value.shape[0])
        for (t, _), state in zip(op.tiled, states or (), strict=True):
            t.let_go(state)
    elif half and (wide or op.tiled):
        y2 = product_beside(x2, base.value, pieces, early, wide)
    else:
        y2 = product(x2, pieces, early) if op.tiled else matmul.linear(x2, base.value, early)
    if states:                                  # used once: what they held for that is gone
        made.keep("states", states)
    kept = [t.forward_(x2, y2, s) for t, s in op.token]
    gain = wrap_kept = None
    if op.wrap is not None:
        gain = made.found("gain")
        if gain is None:
            with made.making():
                all_states = (states or op.prepared()) + [t.prepare() for t, _ in op.token]
                gain, wrap_kept = op.wrap.gains(Panels(base.value, op.tiled + op.token, all_states))
            made.keep("gain", gain)
        y2.mul_(gain)
        if b is not None:
            y2.add_(b)
    return _Ran(y2, base, states, kept, gain, wrap_kept)


def _size(op: Weighted, base: Base, x2: Tensor, made: Made) -> int:
    """Bytes of V, once it is known that anybody keeps it."""
    if made is NOTHING:
        return 0
    return made.small("rows", lambda: base.value.shape[0]) * x2.shape[1] * x2.element_size()


def _alone(x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """The forward where no graph is wanted."""
    with cast.uncast(x):
        if op.tiled or op.wrap is not None:
            y = _run(x, op, bias, weight, op.made(x)).y
        else:                                    # a token of a generation: little but the products
            W = op.frozen(x) if weight is None else weight
            W, b = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
            x2 = x.reshape(-1, x.shape[-1])
            y = matmul.linear(x2, W, b)
            for t, s in op.token:
                t.forward_(x2, y, s)
    return shaped(y, (*x.shape[:-1], y.shape[-1])) if y.dtype == x.dtype else \
        shaped(y.to(x.dtype), (*x.shape[:-1], y.shape[-1]))


class _Linear(torch.autograd.Function):
    @staticmethod
    @uncast
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                op: Weighted, left: bool, *theta: Tensor) -> Tensor:
        y2, base, ctx.states, kept, ctx.gain, ctx.wrap_kept = _run(x, op, bias, weight, left=left)
        stored = base.stored
        ctx.op, ctx.call, ctx.shape = op, current(), x.shape
        # as in stock torch: what backward reads is kept or watched, and nothing else
        panels = op.wrap is not None and op.wrap.keeps_input
        reads_w = ctx.needs_input_grad[0] or panels
        keep_w = reads_w and (weight is not None
                              or isinstance(stored, Tensor) and is_stored(stored))
        ctx.seen_as = ctx.needs_input_grad[0], panels, not keep_w
        ctx.seen = _seen(op, *ctx.seen_as)
        ctx.keeps = [t.keeps_input for t, _ in op.tiled], panels
        ctx.weight = stored.dtype, stored.shape
        keep_x = op.keeps_input or ctx.needs_input_grad[1]
        ctx.by_strips = ctx.seen is not None and op.wrap is None and not any(ctx.keeps[0]) \
            and not ctx.needs_input_grad[1] \
            and all(t.by_strips(part) for (t, _), part in zip(op.token, kept, strict=True))
        tensors = [x if keep_x else None, stored if keep_w else None]
        ctx.layout = []
        for part in kept:
            ctx.layout.append([len(tensors) - 2 + i if isinstance(p, Tensor) else p
                               for i, p in enumerate(part)])
            ctx.layout[-1] = [(True, v) if isinstance(p, Tensor) else (False, p)
                              for v, p in zip(ctx.layout[-1], part, strict=True)]
            tensors += part
        ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in tensors])
        return shaped(y2.to(x.dtype), (*x.shape[:-1], y2.shape[-1]))

    @staticmethod
    @functions.once_differentiable
    @as_then
    @uncast
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        op: Weighted = ctx.op
        if ctx.seen is None:
            return _Linear.pulled(ctx, op, g)
        with as_required(op.theta(), ctx.needs_input_grad[5:]):
            op.check(ctx.seen, op.reads(*ctx.seen_as))
            return _Linear.pulled(ctx, op, g)

    @staticmethod
    def pulled(ctx: Any, op: Weighted, g: Tensor) -> tuple[Any, ...]:
        x, stored, *saved = _opened(ctx)
        kept = [tuple(saved[v] if isT else v for isT, v in part) for part in ctx.layout]
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        g2 = g.reshape(-1, g.shape[-1])
        x2 = x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) else x
        keeps, panels = ctx.keeps
        if need_x or panels:
            W = op.frozen(g2) if stored is None else stored
            W = W if W.dtype == g2.dtype else W.to(g2.dtype)
        else:                                    # only its shape is asked
            W = g2.new_empty(()).expand(ctx.weight[1])
        db = g2.sum(0) if need_b else None
        # by the order of op.all: an identity would bind a compiled graph to these very terms
        grads: list[list[Tensor | None]] = [[None] * len(t.theta()) for t in op.all]
        if op.wrap is not None:
            if panels:
                own = [t.gain_(g2, x2, part, s)
                       for (t, s), part in zip(op.token, kept, strict=True)]
                whole = [ts for ts, d in zip(op.token, own, strict=True) if d is None]
                states = ctx.states + [t.prepare() for t, _ in whole]
                V = Panels(W, op.tiled + whole, states)
                df = torch.zeros_like(ctx.gain)
                for d in own:
                    df += 0 if d is None else d
                for i0, i1 in V.ranges():
                    G = g2.t() @ x2[:, i0:i1]
                    df += G.mul_(V.value(i0, i1)).sum(-1, dtype=df.dtype)
                grads[-1] = op.wrap.pull_gains(df, ctx.wrap_kept)
            g2 = _gained(g2, ctx.gain)
        V = Panels(W, op.tiled, ctx.states)
        tiled = len(op.tiled)
        dx = product_back(g2, x2, V, grads[:tiled], need_x, keeps)
        for k, ((t, s), part) in enumerate(zip(op.token, kept, strict=True), tiled):
            grads[k] = t.backward_(g2, x2, part, dx, s)
        dW = matmul.tn(g2, x2).to(ctx.weight[0]) if need_w else None
        flat = [p for own in grads for p in own]
        return (None if dx is None else shaped(dx, ctx.shape)), dW, db, None, None, *flat


def _opened(ctx: Any) -> Sequence[Any]:
    """What was kept; the input strip by strip where that will do."""
    if ctx.by_strips and (raw := getattr(ctx, "_raw_saved_tensors", None)) is not None \
            and (x := strips(raw[0].data)) is not None:
        return x, *[r.unpack() for r in raw[1:]]
    return ctx.saved_tensors


def _gained(t: Tensor, f: Tensor) -> Tensor:
    """t f in t's precision, multiplied in the wider of both and rounded once."""
    return torch.mul(t, f, out=torch.empty_like(t))
