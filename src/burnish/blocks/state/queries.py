"""Queries of their own that read a frozen block's tokens, and are read by nobody.

    q = W_q Norm(Q),   K and V of the block's own tokens,   o_t = sum_n p_tn v_n,  p_t = softmax

The gradient of o_t reaches q_t alone, and needs of the tokens only how their keys and values vary
together under p_t:

    dq_t = s C_t do_t,      C_t = sum_n p_tn (k_n - sum_m p_tm k_m) v_n^T        (h, h) per head

so C_t is kept, T h numbers for each channel whatever the number of tokens, or keys and values
where these are fewer (2 N).

Letters: B batch, H heads, h width of a head, N tokens, T queries, D width, L blocks, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.followed import compiling, is_fake
from ..tape.executor import no_grad
from ..tape.functions import applied, once_differentiable, transformed
from .attending import SDPA
from .attending import named as attention_arguments
from .prompts import Listener, named
from .taps import Beside


def read(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None
         ) -> Tensor:
    """(B, H, T, h): what queries q (B, H, T, h) find in keys and values (B, H, N, h) that need no
    gradient. mask: what fits on (B, H, T, N), True for what may be seen or numbers added."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if transformed() or compiling():
        return (_shares(q, k, scale, mask) @ v.to(_wide(q))).to(q.dtype)
    return applied(_Read, q, k, v, scale, mask)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _shares(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """p, (B, H, T, N), in fp32 at least."""
    scores = (q @ k.mT).to(_wide(q)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else \
            scores + mask.to(scores.dtype)
    return scores.softmax(-1)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
                ) -> Tensor:
        p = _shares(q, k, scale, mask)
        out = (p.to(v.dtype) @ v).to(q.dtype)
        ctx.scale, ctx.dtype = scale, q.dtype
        ctx.few = q.shape[-2] * q.shape[-1] <= 2 * k.shape[-2]
        if ctx.needs_input_grad[0] and ctx.few:
            ctx.save_for_backward(torch.stack([_together(p[..., t, :], k, v)
                                               for t in range(q.shape[-2])], 2).to(q.dtype))
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(p.to(q.dtype), k, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.few:
            (C,) = ctx.saved_tensors
            dq = (C @ g.to(C.dtype).unsqueeze(-1)).squeeze(-1)
        else:
            p, k, v = ctx.saved_tensors
            dp = g.to(v.dtype) @ v.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            dq = ds.to(k.dtype) @ k
        return (dq * ctx.scale).to(ctx.dtype), None, None, None, None


def _together(p: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """C of one query of every sample, (B, H, h, h), from its shares (B, H, N)."""
    k, v = k.to(p.dtype), v.to(p.dtype)
    apart = (k - p.unsqueeze(-2) @ k) * p.unsqueeze(-1)
    return apart.mT @ v


def _of_keys(mask: Tensor | None, module: nn.Module) -> Tensor | None:
    """A mask that all queries share, as one row; RecipeError for one that goes by the query."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    row = mask[..., :1, :]
    known = not is_fake(mask) and mask.stride(-2)
    if known and not torch.equal(mask, row.expand_as(mask)):
        raise RecipeError(f"vqt: {type(module).__name__} adds a mask or a bias to its attention "
                          "that goes by the place of the query (relative positions, windows), and "
                          "queries of their own have none")
    return row


class Queried(Beside):
    """Listens to one block, which runs without a graph. rows (T, D) then go through it as queries
    alone: its attention reads the keys and values it has just made of its tokens, the rest of it
    is as it is. The mean of what comes out waits for :class:`Columns`.

    weighted: a mean by the softmax of numbers of its own, all alike at the start.
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor, weighted: bool = False):
        super().__init__(state, adapter)
        self.rows = nn.Parameter(rows)
        self.share = nn.Parameter(torch.zeros(len(rows))) if weighted else None

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = args[0] if args else next(iter(kw.values()))
        if given.dim() != 3 or named(module, args, kw).get("position_embeddings") is not None:
            raise RecipeError("vqt: queries stand nowhere among tokens (batch, tokens, width); "
                              f"{type(module).__name__} is given {tuple(given.shape)}, or rotates "
                              "them by positions")
        args, kw = self.alone(module, given, args, kw)
        seen: list[dict[str, Any]] = []

        def watch(func: Callable[..., Tensor], a: tuple, k: dict) -> Tensor:
            seen.append(attention_arguments(a, k))
            return func(*a, **k)

        def answer(func: Callable[..., Tensor], a: tuple, k: dict) -> Tensor:
            mine, own = attention_arguments(a, k), seen[0]
            return read(mine["query"], own["key"], own["value"], own.get("scale"),
                        _of_keys(own.get("attn_mask"), module))

        with self.state.tape.answering({SDPA: watch}):
            out = no_grad(module, call, args, kw)
        if len(seen) != 1 or seen[0].get("is_causal"):
            raise RecipeError(f"vqt: {type(module).__name__} computed its attention without one "
                              "F.scaled_dot_product_attention that sees all tokens; load the model "
                              "with attn_implementation='sdpa'")
        rows = self.rows.to(given.dtype).expand(len(given), -1, -1)
        with self.state.tape.answering({SDPA: answer}):
            made = call(rows, *args[1:], **kw) if args else call(**{**kw, next(iter(kw)): rows})
        made = made[0] if isinstance(made, tuple) else made
        mean = made.mean(1) if self.share is None else \
            torch.einsum("t,btd->bd", self.share.softmax(0).to(made.dtype), made)
        self.here.box.setdefault(("queries", self.adapter), []).append(mean)
        return out


class Columns(Listener):
    """Listens to a head of one linear, whose weight has further columns: ``y = head(x) + V s``, s
    (B, L D) what the queries of all blocks have found.

    weight (C, L D), 0 at the start. alive: the features that are read.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, features: int, classes: int):
        super().__init__(state, adapter)
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.register_buffer("alive", torch.ones(features, dtype=torch.bool))

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        found = torch.cat(self.here.box.pop(("queries", self.adapter)), -1)
        y = call(*args, **kw)
        if y.shape[:-1] != found.shape[:-1]:
            raise RecipeError(f"the head answers {tuple(y.shape)}, where one row a sample is "
                              "expected: further features stand beside those of the whole input")
        return y + F.linear(found * self.alive, self.weight.to(found.dtype)).to(y.dtype)

    def lasso(self) -> Tensor:
        """The sum of the lengths of its columns."""
        return torch.linalg.vector_norm(self.weight, dim=0).sum()

    def lasso_gradient(self) -> Tensor:
        """Of it; a column of zeros has none."""
        length = torch.linalg.vector_norm(self.weight, dim=0)
        return self.weight / torch.where(length > 0, length, 1)

    @torch.no_grad()
    def choose(self, share: float) -> None:
        """Leave the features with the longest columns, this share of them; V begins again."""
        keep = max(1, round(share * len(self.alive)))
        length = torch.linalg.vector_norm(self.weight, dim=0)
        self.alive.zero_()[length.topk(keep).indices] = True
        self.weight.zero_()
