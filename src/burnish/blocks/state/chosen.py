"""Attention to a few keys of each query, chosen by the codes that they share.

    out_i = sum_{j in K(i)} p_ij v_j,     p_ij ~ exp(clamp(t q_i . k_j, -10, 10) + mask_ij)

K(i): of the keys that i may see, the `kept` ones which share most codes with it; among equals those
nearest to i, the earlier of two first. A query that may see fewer attends to all of them.

Rows of queries are taken a few at a time, and again in backward, so nothing of tokens x tokens is
ever whole. Kept for backward: queries, keys and values, their codes (one byte per sub-space), one
number per query which says where its choice ends.

Letters: B batch, H heads, T tokens, h width of a head, S sub-spaces, r rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..tape.functions import applied, once_differentiable, transformed
from ..tape.replay import replay, rng_state
from .attending import Attending, named
from .quantised import Codebook

#: scores are cut here, on both sides
LIMIT = 10.0
#: a number of a mask below it hides a key
CLOSED = -1e4
#: the score of what is not to be seen: finite, so that no gradient is not a number
NOTHING = -1e30
#: numbers of a strip of scores
STRIP = 1 << 22


@dataclass(frozen=True)
class How:
    """kept: keys of a query. scale: t. causal: no token sees a later one. p: dropout of p_ij."""

    kept: int
    scale: float
    causal: bool = False
    p: float = 0.0


def chosen(q: Tensor, k: Tensor, v: Tensor, codes: tuple[Tensor, Tensor], how: How,
           mask: Tensor | None = None) -> Tensor:
    """(B, H, T, h) from queries, keys and values of that shape, all with as many heads.

    codes: of queries and keys, (S, B, H, T) each. mask: what fits on (B, H, T, T), True for what
    may be seen or numbers that are added to scores; the gradient of such numbers is made.
    """
    if transformed():
        return _plain(q, k, v, codes, how, mask)[0].to(q.dtype)
    return applied(_Chosen, q, k, v, mask, *codes, how)


def choice(codes: tuple[Tensor, Tensor], how: How, mask: Tensor | None = None) -> Tensor:
    """K as it is, (B, H, T, T): small ones, to look at."""
    B, H, T = codes[0].shape[1:]
    return _select(codes, _Rows(0, T, T), how, _seen(mask, _Rows(0, T, T), how, codes[0].device),
                   None)[0].expand(B, H, T, T)


@dataclass(frozen=True)
class _Rows:
    """Queries a..b, which see keys before `end`."""

    a: int
    b: int
    end: int


def _strips(q: Tensor, causal: bool) -> Iterator[_Rows]:
    B, H, T = q.shape[:3]
    r = max(1, STRIP // (B * H * T))
    for a in range(0, T, r):
        b = min(a + r, T)
        yield _Rows(a, b, b if causal else T)


def _part(mask: Tensor, rows: _Rows) -> Tensor:
    """The mask of some rows."""
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows.a : rows.b, :]
    return mask[..., : rows.end]


def _seen(mask: Tensor | None, rows: _Rows, how: How, device: torch.device) -> Tensor:
    """What may be seen: fits on (B, H, r, end)."""
    at = torch.arange(rows.a, rows.b, device=device).unsqueeze(1)
    seen = torch.arange(rows.end, device=device) <= (at if how.causal else rows.end)
    if mask is None:
        return seen
    mask = _part(mask, rows)
    return seen & (mask if mask.dtype == torch.bool else mask > CLOSED)


def _select(codes: tuple[Tensor, Tensor], rows: _Rows, how: How, seen: Tensor,
            last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(K of some rows, the rank of the last that is chosen of each (B, H, r)), where `last` is
    known without looking for it."""
    T = codes[0].shape[-1]
    if how.kept >= T:
        return seen, None
    at = torch.arange(rows.a, rows.b, device=seen.device).unsqueeze(1)
    to = torch.arange(rows.end, device=seen.device)
    rank = 2 * (T - (at - to).abs()).to(torch.int32) - (to > at).int()      # no two of a row alike
    for of_q, of_k in zip(*codes, strict=True):              # sub-space by sub-space
        same = of_q[..., rows.a : rows.b, None] == of_k[..., None, : rows.end]
        rank = rank + same.int() * (2 * T)
    rank = rank.masked_fill(~seen, -1)
    if last is None:
        last = rank.topk(min(how.kept, rows.end), -1).values[..., -1].clamp_min(0)
    return rank >= last.unsqueeze(-1), last


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, rows: _Rows, how: How, sel: Tensor
             ) -> tuple[Tensor, Tensor]:
    """(scores before they are cut, p), both (B, H, r, end); p is 0 where nothing is chosen."""
    s = (q[:, :, rows.a : rows.b] @ k[:, :, : rows.end].transpose(-1, -2)) * how.scale
    cut = s.clamp(-LIMIT, LIMIT)
    if mask is not None and mask.dtype != torch.bool:
        cut = cut + _part(mask, rows)
    return s, torch.softmax(cut.masked_fill(~sel, NOTHING), -1) * sel


def _drop(p: Tensor, how: How) -> Tensor | None:
    return F.dropout(torch.ones_like(p), how.p, True) if how.p else None


def _plain(q: Tensor, k: Tensor, v: Tensor, codes: tuple[Tensor, Tensor], how: How,
           mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(the answer, ranks of the last chosen ones), by differentiable torch functions alone."""
    q, k, v = _wide(q, k, v)
    outs, lasts = [], []
    for rows in _strips(q, how.causal):
        sel, last = _select(codes, rows, how, _seen(mask, rows, how, q.device), None)
        _, p = _weights(q, k, mask, rows, how, sel)
        drop = _drop(p, how)
        outs.append((p if drop is None else p * drop) @ v[:, :, : rows.end])
        lasts.append(last)
    return torch.cat(outs, 2), torch.cat(lasts, 2) if lasts[0] is not None else None


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


class _Chosen(torch.autograd.Function):
    """The same, made again strip by strip in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, of_q: Tensor,
                of_k: Tensor, how: How) -> Tensor:
        ctx.how, ctx.state = how, rng_state(q.device) if how.p else None
        out, last = _plain(q, k, v, (of_q, of_k), how, mask)
        ctx.save_for_backward(q, k, v, mask, of_q, of_k, last)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if ctx.state is None:
            return _backward(ctx, g)
        with replay(g.device, ctx.state):
            return _backward(ctx, g)


def _backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
    *qkv, mask, of_q, of_k, last = ctx.saved_tensors
    how, added = ctx.how, ctx.needs_input_grad[3]
    q, k, v, g = _wide(*qkv, given)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    dm = torch.zeros_like(mask, dtype=q.dtype) if added else None
    for rows in _strips(q, how.causal):
        mine, seen = slice(rows.a, rows.b), _seen(mask, rows, how, q.device)
        sel, _ = _select((of_q, of_k), rows, how, seen, None if last is None else last[..., mine])
        s, p = _weights(q, k, mask, rows, how, sel)
        drop = _drop(p, how)
        dp = g[:, :, mine] @ v[:, :, : rows.end].transpose(-1, -2)
        if drop is not None:
            dp = dp * drop
        dv[:, :, : rows.end] += (p if drop is None else p * drop).transpose(-1, -2) @ g[:, :, mine]
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if dm is not None:
            part = _part(dm, rows)
            part += ds.sum_to_size(part.shape)
        ds = ds * (s.abs() <= LIMIT) * how.scale
        dq[:, :, mine] = ds @ k[:, :, : rows.end]
        dk[:, :, : rows.end] += ds.transpose(-1, -2) @ q[:, :, mine]
    grads = [d.to(t.dtype) for d, t in zip((dq, dk, dv), qkv, strict=True)]
    return *grads, None if dm is None else dm.to(mask.dtype), None, None, None


def recall(q: Tensor, k: Tensor, codes: tuple[Tensor, Tensor], how: How,
           mask: Tensor | None = None) -> float:
    """Of the `kept` keys with the largest scores of a query, the share that is chosen; over the
    queries that may see more than so many. Makes (B, H, T, T)."""
    B, H, T = q.shape[:3]
    seen = _seen(mask, _Rows(0, T, T), how, q.device).expand(B, H, T, T)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, NOTHING)
    best = torch.zeros_like(seen).scatter(-1, scores.topk(how.kept, -1).indices, True)
    many = seen.sum(-1) > how.kept
    return float((best & choice(codes, how, mask)).sum(-1)[many].double().mean() / how.kept)


class Coded(Attending):
    """Answers for the attention of one module: each query attends to the keys of its codes.

    keep: share of the keys. weight: of the codebook loss, which rides on the answer while
    the words train; pulls: it moves queries and keys too. Queries of another number than keys
    (a cache, another sequence) are left to the exact attention.
    """

    part = "pq_attention"

    def __init__(self, state: Any, adapter: str, codebook: Codebook, keep: float, weight: float,
                 pulls: bool):
        super().__init__(state, adapter)
        self.codebook, self.keep, self.weight, self.pulls = codebook, keep, weight, pulls

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        given = named(args, kwargs)
        q, k, v, mask = (given.get(n) for n in ("query", "key", "value", "attn_mask"))
        if q.shape[-2] != k.shape[-2]:
            return func(*args, **kwargs)
        if q.dim() != 4:
            raise RecipeError(f"{self.part}: an attention of queries {tuple(q.shape)}; expected "
                              "(batch, heads, tokens, width)")
        T, h = q.shape[2:]
        how = How(max(1, math.ceil(self.keep * T - 1e-6)), given.get("scale") or h**-0.5,
                  bool(given.get("is_causal")), given.get("dropout_p", 0.0))
        codes = self.codebook.codes(q), self.codebook.codes(k)
        alike = q.shape[1] // k.shape[1]
        whole = [x.repeat_interleave(alike, 1) if alike > 1 else x for x in (k, v)]
        with torch.autocast(q.device.type, enabled=False):
            out = chosen(q, *whole, (codes[0], codes[1].repeat_interleave(alike, 2)), how, mask)
            return self._taught(out, q, k)

    def _taught(self, out: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The answer, with the codebook loss on it where it is asked for."""
        riding = self.state.riding
        if not (self.codebook.words.requires_grad and riding.wanted):
            return out
        if transformed() and riding.collected is None:
            raise RecipeError(f"{self.part}: its codebook loss rides on backward, which torch.func "
                              "does not run")
        valid = context().valid
        if valid is not None and valid.shape != (q.shape[0], q.shape[2]):
            valid = None
        if not self.pulls:
            q, k = q.detach(), k.detach()
        term = self.codebook.loss(q, valid) + self.codebook.loss(k, valid)
        return riding.on(out, term, self.weight)
