"""Rows before keys and values that a layer makes of the instruction it is given.

    U = H W_d^T (n, m),   S = softmax_tokens(U W_s^T) (n, L),   Z = S^T U (L, m)
    P = R(Z) W_u^T + b (L, D),   K' = [n(P) W_k^T; K],   V' = [n(P) W_v^T; V]

H are the layer's input states of the tokens of an instruction, n the norm before its attention. R
is a quotient of polynomials, number by number: ``sum_i a_i z^i / (1 + |sum_j b_j z^j|)``. What
comes of P behind the attention is left out, as the next layer has rows of its own, so P is no more
than keys and values, made once: a key-value cache carries them to the tokens that follow.

Letters: B batch, T tokens, n those of the instruction, L rows, m bottleneck, D width, H heads of
keys, h width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context, current, resume
from ...core.errors import RecipeError
from .attending import Attending, named
from .gated_rows import Source
from .keys_values import joined, opened
from .prompts import Listener, tokens_known
from .prompts import named as arguments

#: numerator and denominator of R near the GELU: at most 8e-5 from it on [-3, 3]
GELU = ((7.5087531e-05, 0.5, 0.397992424, 0.177115613, 0.0767293232, 0.0218826893, 0.00243027931),
        (0.0, 0.354231226, 0.0, 0.0437653785))
#: what a cache carries, by (adapter, attention): keys and values of its rows
_CARRIED = "burnish_rows"


class Rational(nn.Module):
    """R. a (7,) and b (4,) train, in fp32 at least: a sixth power in half precision is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(c)) for c in GELU)
        self.a.burnish_decay = self.b.burnish_decay = False

    def forward(self, z: Tensor) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        with torch.autocast(z.device.type, enabled=False):
            top = _polynomial(self.a, wide)
            return (top / (1 + (wide * _polynomial(self.b, wide)).abs())).to(z.dtype)


def _polynomial(c: Tensor, z: Tensor) -> Tensor:
    """``sum_i c_i z^i``."""
    out = c[-1].expand_as(z)
    for one in c[:-1].flip(0):
        out = out * z + one
    return out.to(z.dtype)


class FromInstruction(nn.Module):
    """P (B, L, D) of H (B, T, D) and which of its tokens count, (B, T). W_d, W_s as linears start,
    W_u N(0, 0.02^2), b zero. settled: R stays, whoever steps."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.score = nn.Linear(hidden, length, bias=False)
        self.up = nn.Linear(hidden, width)
        self.rational, self.settled = Rational(), False
        self.begin(again=False)

    @torch.no_grad()
    def begin(self, again: bool = True) -> None:
        """Begin, or begin again with all but R."""
        if again:
            self.down.reset_parameters()
            self.score.reset_parameters()
        self.up.weight.normal_(std=0.02)
        self.up.bias.zero_()

    def forward(self, h: Tensor, counts: Tensor) -> Tensor:
        U = self.down(h.to(self.down.weight.dtype))
        scores = self.score(U).masked_fill(~counts.unsqueeze(-1), -torch.inf)
        Z = scores.softmax(1).mT @ U
        return self.up(self.rational(Z))


class Instruction(Listener):
    """Listens to a model: says which of its tokens are the instruction, (B, T): real ones before
    the first with a label (the first one at least, which is nobody's answer); without labels all
    real ones. And how many tokens a cache knows already."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw, here = arguments(module, args, kw), current()
        if here is None:
            return call(**kw)
        facts = {f"{self.adapter} cached": tokens_known(kw)}
        labels, real = kw.get("labels"), here.valid
        if labels is not None:
            real = torch.ones_like(labels) if real is None else real
            at = torch.arange(labels.shape[1], device=labels.device)
            told = torch.where(labels != -100, at, labels.shape[1]).amin(1, keepdim=True)
            first = torch.where(real.bool(), at, labels.shape[1]).amin(1, keepdim=True)
            facts[f"{self.adapter} instruction"] = real.bool() & ((at < told) | (at == first))
        with resume(replace(here, given={**here.given, **facts})):
            return call(**kw)


class Normed(Listener):
    """Listens to a norm of a block: the attention may find what it was given, and ask it again."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        self.here.box["normed", self.adapter] = (out, args[0] if args else next(iter(kw.values())),
                                                 call)
        return out


class Instructed(Attending):
    """Listens to one attention: rows that `maker` makes of the states before its norm stand before
    its keys and values (behind rotary positions: they stand nowhere). sources: see GatedRows."""

    what = "a prompt"
    part = "iapt"

    def __init__(self, state: Any, adapter: str, length: int, width: int, hidden: int,
                 sources: Sequence[Source], path: str):
        super().__init__(state, adapter)
        self.maker = FromInstruction(length, width, hidden)
        self.sources, self.path, self.length = tuple(sources), path, length

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = arguments(module, args, kw)
        x = next(iter(given.values()))
        self.__dict__["now"] = self.rows(module, x, given.get("past_key_values"))
        try:
            return super().around(module, call, *args, **kw)
        finally:
            del self.__dict__["now"]

    def rows(self, module: nn.Module, x: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, (B, L, H h): made, or those that the cache carries."""
        facts, key = context().given, (self.adapter, self.path)
        carried = {} if past is None else vars(past).setdefault(_CARRIED, {})
        known = facts.get(f"{self.adapter} cached")
        if known or known is None and key in carried:
            if key not in carried:
                raise RecipeError("iapt: this key-value cache was filled without the rows that an "
                                  "instruction makes: begin with an empty one")
            return carried[key]
        out, before, norm = self.here.box.pop(("normed", self.adapter), (None, None, None))
        if out is not x:
            raise RecipeError(f"iapt needs blocks that begin with a norm; {self.path} reads "
                              "something else")
        counts = facts.get(f"{self.adapter} instruction", context().valid)
        counts = x.new_ones(x.shape[:2]) if counts is None else counts
        if counts.shape != x.shape[:2]:
            raise RecipeError(f"iapt: the batch speaks of {counts.shape[1]} tokens, and a layer "
                              f"reads {x.shape[1]}: tokens in front are no part of an instruction")
        P = norm(self.maker(before, counts.bool()).to(before.dtype))
        made = {path: module.get_submodule(path)(P) for path, _ in dict.fromkeys(self.sources)}
        one, two = (made[path][..., slice(*(run or (None,)))] for path, run in self.sources)
        if past is not None:
            carried[key] = one, two
        return one, two

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        return joined(func, named(args, kwargs), self.now,
                      lambda mask, keys: opened(mask, keys, self.length))
