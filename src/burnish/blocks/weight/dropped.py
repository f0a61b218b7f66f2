"""An update that drops part of its input or of its outputs, or all of itself.

    y_n += s k_n m * (Delta drop(x_n))     k_n = 0 with probability `drop_path`, else scaled by
                                           1 / (1 - p): one number per sample
                                           m_o = 0 with probability `rank_dropout`: one number per
                                           output; `rescale` divides m by its mean
    and nothing at all with probability `module_dropout`, unscaled, once for the batch.

Base and update see different inputs then, so they are two products. Delta is made panel by panel as
ever, or works on tokens as it does; of the draws backward keeps a generator's state, k and m, and
makes the dropped input again. The layers that read one tensor one after the other (q, k and v)
share one mask of it.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.call import context, current
from ..tape.functions import version_of
from ..tape.replay import Mask
from .panels import PANEL
from .term import Term, asks_to_drop

_KEY = "the last mask"


def drops(term: Any) -> bool:
    """Does a term drop part of its input, or itself, just now?"""
    term = getattr(term, "term", term)                   # rows of a fused matrix: within.py
    return bool(term.training and asks_to_drop(term))


def stands_beside(term: Any) -> bool:
    """Must it run as a :class:`Dropped` now? Others draw what they drop by themselves."""
    own = getattr(term, "term", term)
    return isinstance(own, Dropping) and not own.own_drops and drops(term)


class Dropping(Term):
    """What a term is that can drop: probabilities `dropout` (of an entry of the input),
    `drop_path` (of the whole update, sample by sample), `rank_dropout` (of an output) and
    `module_dropout` (of the whole update), all in training alone."""

    #: does the term draw by itself, inside what it computes?
    own_drops: ClassVar[bool] = False
    dropout: float = 0.0
    drop_path: float = 0.0
    rank_dropout: float = 0.0
    rescale: bool = False
    module_dropout: float = 0.0

    def plain(self, x: Tensor) -> Tensor:
        if not stands_beside(self):
            return self.product(x)
        y = self.product(F.dropout(x, self.dropout, True))
        if self.rank_dropout:
            y = y * outputs(y, y.shape[-1], self.rank_dropout, self.rescale)
        if self.drop_path:
            k = paths(x, self.drop_path)
            y = (y.reshape(len(k), -1) * k.unsqueeze(1)).view(y.shape)
        return y * stays(y, self.module_dropout) if self.module_dropout else y

    def product(self, x: Tensor) -> Tensor:
        """``x Delta^T`` by differentiable torch functions alone, nothing dropped."""
        return F.linear(x, self.dense().to(x.dtype))


class Dropped:
    """One run of a :class:`Dropping` term: it answers as a term that works on tokens.

    x: the layer's input, (..., in), as the module was given it.
    """

    tokenwise = True

    def __init__(self, term: Any, x: Tensor):
        self.term, self.x = term, x
        self.own = getattr(term, "term", term)
        self.tiled, self.cheap_tile = term.tiled, term.cheap_tile
        self.mask: Mask | None = None
        self.k: Tensor | None = None
        self.m: Tensor | None = None
        self.state: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.term, name)

    def prepare(self) -> Any:
        """What a panel needs to know of the matrix: once for this run."""
        if self.state is None:
            self.state = self.term.prepare()
        return self.state

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        given, self.x, own = self.x, None, self.own
        if own.dropout:
            self.mask, x_NI = _shared(given, x_NI, own.dropout)
        if own.rank_dropout:
            self.m = outputs(x_NI, y_NO.shape[1], own.rank_dropout, own.rescale)
        if own.drop_path:
            self.k = paths(given, own.drop_path).to(x_NI.dtype)
        if own.module_dropout:
            on = stays(x_NI, own.module_dropout)
            self.m = on.expand(y_NO.shape[1]) if self.m is None else self.m * on
        x_NI = self._paths(x_NI)
        if self.term.tokenwise:
            made = y_NO if self.m is None else torch.zeros_like(y_NO)
            kept: tuple[Any, ...] = self.term.forward_(x_NI, made, scale)
            if self.m is not None:
                y_NO.add_(made.mul_(self.m.to(made.dtype)))
            return kept
        state = self.prepare()
        for i0, i1 in ranges(x_NI.shape[1], y_NO.shape[1]):
            tile = self._rows(self.term.tile(i0, i1, state).to(y_NO.dtype))
            y_NO.addmm_(x_NI[:, i0:i1].to(y_NO.dtype), tile.t(), alpha=scale)
        return ()

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        grads: list[Tensor | None] = [None] * len(self.term.theta())
        pulls = self.term.keeps_input
        tokens = self.term.tokenwise
        if not (pulls or tokens) and dx_NI is None:
            return grads
        g_NO = g_NO if self.m is None else g_NO * self.m.to(g_NO.dtype)
        xd = self._again(x_NI) if pulls else None
        if tokens:
            back = None if dx_NI is None else torch.zeros_like(dx_NI)
            grads = self.term.backward_(g_NO, xd, kept, back, scale)
            if back is not None:
                dx_NI.add_(self._again(back))
            return grads
        back = None if dx_NI is None else torch.empty_like(dx_NI)
        for i0, i1 in ranges((xd if pulls else dx_NI).shape[1], g_NO.shape[1]):
            if pulls:
                G = (xd[:, i0:i1].t() @ g_NO).t()
                tile = self.term.pull(i0, i1, G if scale == 1 else G * scale, self.state, grads)
            else:
                tile = self.term.tile(i0, i1, self.state)
            if back is not None:
                back[:, i0:i1] = g_NO @ tile.to(g_NO.dtype)
        del xd
        if back is not None:                     # all draws are factors: the same on the gradient
            dx_NI.add_(self._again(back), alpha=scale)
        return grads

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[Any, ...], scale: float
              ) -> Tensor | None:
        xd = self._again(x_NI)
        if self.term.tokenwise:
            made = torch.zeros_like(g_NO)
            with torch.no_grad():
                self.term.forward_(xd, made, scale)
            return self._rows(made.mul_(g_NO).sum(0))
        total = g_NO.new_zeros(g_NO.shape[1])
        for i0, i1 in ranges(xd.shape[1], g_NO.shape[1]):
            tile = self.term.tile(i0, i1, self.state)
            total += ((g_NO.t() @ xd[:, i0:i1]) * tile).sum(-1).mul_(scale)
        return self._rows(total)

    def _rows(self, t: Tensor) -> Tensor:
        """Outputs lie along the first axis."""
        m = self.m
        return t if m is None else t * m.to(t.dtype).view(-1, *[1] * (t.dim() - 1))

    def _paths(self, t: Tensor) -> Tensor:
        k = self.k
        return t if k is None else (t.reshape(len(k), -1) * k.unsqueeze(1)).view(t.shape)

    def _again(self, t: Tensor) -> Tensor:
        """`t` under the draws of the forward."""
        return self._paths(t if self.mask is None else self.mask(t))


def ranges(inp: int, out: int) -> list[tuple[int, int]]:
    """Runs of inputs, a panel each."""
    step = max(1, PANEL // out)
    return [(i, min(inp, i + step)) for i in range(0, inp, step)]


def paths(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p): one number per sample of a layer's input (..., in).

    A sample is a row of the first axis, or a run of them where the model was called with fewer
    (windows, tokens of a flattened batch).
    """
    rows = x.shape[0] if x.dim() > 1 else 1
    called = context().samples
    n = rows if rows in called else next((n for n in called if n and not rows % n), rows)
    return x.new_empty(n).bernoulli_(1 - p).div_(1 - p)


def outputs(like: Tensor, n: int, p: float, rescale: bool) -> Tensor:
    """(n,) numbers, 0 with probability p, else 1; rescale: over their mean, where it is not 0."""
    m = like.new_empty(n).bernoulli_(1 - p)
    return m / m.mean().clamp_min(1 / n) if rescale else m


def stays(like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1: (1,)."""
    return like.new_empty(1).bernoulli_(1 - p)


class _Last:
    """The mask that the last reader of a tensor drew; the tensor itself is not held."""

    def __init__(self, x: Tensor, mask: Mask):
        self.of, self.version, self.mask = weakref.ref(x), version_of(x), mask


def _shared(x: Tensor, x_NI: Tensor, p: float) -> tuple[Mask, Tensor]:
    """(the mask, x_NI under it): the last reader's where it read the same tensor, else drawn."""
    call = current()
    last = None if call is None else call.box.get(_KEY)
    if last is not None and last.of() is x and last.version == version_of(x) and last.mask.p == p:
        return last.mask, last.mask(x_NI)
    mask = Mask(x_NI, p)
    dropped = mask.first(x_NI)
    if call is not None:
        call.box[_KEY] = _Last(x, mask)
    return mask, dropped
