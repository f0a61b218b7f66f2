"""Attention on bits, with estimates of what the bits leave out.

    S = (q_b k_b^T + m_q p_k^T + p_q m_k^T + p_q p_k^T) / sqrt(h) + mask
    P = softmax(S) in bits,   context = P (v_b + r)

q_b, k_b and v_b are signs with a scale that trains, P zeros and another (elastic.py). Of what the
attention reads, x, linears estimate the bits (m) and what they leave out (p) of queries and keys, R
numbers a token for all heads, and one number a token, r, of values. Where m are the bits and p
what they leave out, S is ``q k^T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.executor import checkpoint
from ..weight.elastic import SIGNED, signed, unsigned
from .attending import Attending, named, watched
from .laplacian import probabilities


def joined(q: Tensor, k: Tensor, m_q: Tensor, p_q: Tensor, m_k: Tensor, p_k: Tensor
           ) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, T, h + 3 R) whose products are the corrected scores: of q and k
    (B, H, T, h) and estimates (B, 1, T, R)."""
    def of(*parts: Tensor) -> Tensor:
        return torch.cat([p.expand(*q.shape[:2], -1, -1) for p in parts], -1)
    return of(q, m_q, p_q, p_q), of(k, p_k, m_k, p_k)


class Estimated(Attending):
    """Listens to an attention that reads x (B, T, D).

    q, k, v, p: the scales, one number each, which train without weight decay. m_q, p_q, m_k, p_k (D
    -> R) and r (D -> 1): linears with biases; weights N(0, 0.02), biases 0; zero: all of p and r
    too. Kept for backward: q, k, v and x; what is tokens^2 is made again.
    """

    what = "attention on bits"
    part = "bipft"

    def __init__(self, state: Any, adapter: str, width: int, rank: int, zero: bool):
        super().__init__(state, adapter)
        self.q, self.k, self.v, self.p = (nn.Parameter(torch.ones(())) for _ in range(4))
        for scale in (self.q, self.k, self.v, self.p):
            scale.burnish_decay = False              # type: ignore[attr-defined]
        self.m_q, self.p_q, self.m_k, self.p_k = (nn.Linear(width, rank) for _ in range(4))
        self.r = nn.Linear(width, 1)
        for linear in (self.m_q, self.m_k, self.p_q, self.p_k, self.r):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (self.p_q, self.p_k, self.r) if zero else ():
            nn.init.zeros_(linear.weight)

    @torch.no_grad()
    def begin(self, sizes: tuple[float, float, float, float], peak: float) -> None:
        """Start the scales from the mean sizes of queries, keys, values and probabilities, the last
        one `peak` times that."""
        for scale, size in zip((self.q, self.k, self.v), sizes, strict=False):
            scale.fill_(SIGNED * size)
        self.p.fill_(peak * sizes[3])

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box, key = self.here.box, (self.part, self.adapter)
        box[key] = args[0] if args else next(iter(kw.values()))
        out = super().around(module, call, *args, **kw)
        box.pop(key, None)
        return out

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        given, x = named(args, kwargs), self.here.box[self.part, self.adapter]
        q, k, v = given["query"], given["key"], given["value"]
        T = x.shape[1] if x.dim() == 3 else 0
        if q.dim() != 4 or x.shape[0] != q.shape[0] or {T} != {q.shape[2], k.shape[2]}:
            raise RecipeError(f"{self.part}: {type(module).__name__} reads {tuple(x.shape)} and "
                              f"attends with queries {tuple(q.shape)} to keys {tuple(k.shape)}: "
                              "what its bits leave out is estimated of the tokens it reads, all of "
                              "them and no others; write on without a cache (use_cache=False)")
        scale = given.get("scale")
        with torch.autocast(q.device.type, enabled=False):
            return checkpoint(self, self.answer, (
                q, k, v, x.to(q.dtype), q.shape[-1] ** -0.5 if scale is None else scale,
                given.get("attn_mask"), bool(given.get("is_causal")),
                float(given.get("dropout_p") or 0.0)), {})

    def answer(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, scale: float, mask: Tensor | None,
               causal: bool, dropout: float) -> Tensor:
        """The context, (B, H, T, h)."""
        m_q, p_q, m_k, p_k, r = (
            F.linear(x, e.weight.to(x.dtype), e.bias.to(x.dtype)).unsqueeze(1)
            for e in (self.m_q, self.p_q, self.m_k, self.p_k, self.r))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1)
                for t in (signed(k, self.k), signed(v, self.v)))
        Q, K = joined(signed(q, self.q), k, m_q, p_q, m_k, p_k)
        P = F.dropout(probabilities(Q, K, scale, mask, causal), dropout)
        return unsigned(P, self.p).to(v.dtype) @ (v + r)


class Sizes:
    """Mean sizes of what attentions are given, gathered while the base runs."""

    def __init__(self, paths: Iterable[str]):
        self.totals = {path: [0.0] * 4 for path in paths}
        self.counts = {path: [0] * 4 for path in self.totals}

    @contextmanager
    def seen(self, model: nn.Module) -> Iterator[None]:
        with watched(model, self.totals, self.told):
            yield

    def told(self, path: str, given: dict[str, Any]) -> None:
        q, k, v = (given[n] for n in ("query", "key", "value"))
        rows = q.numel() // q.shape[-1]              # of probabilities, which add up to one
        sizes = [float(t.double().abs().sum()) for t in (q, k, v)]
        for i, (size, n) in enumerate(zip([*sizes, float(rows)], [
                q.numel(), k.numel(), v.numel(), rows * k.shape[-2]], strict=True)):
            self.totals[path][i] += size
            self.counts[path][i] += n

    def of(self, path: str) -> tuple[float, float, float, float] | None:
        """Of queries, keys, values and probabilities; None where the attention did not run."""
        t, n = self.totals[path], self.counts[path]
        return None if not n[0] else (t[0] / n[0], t[1] / n[1], t[2] / n[2], t[3] / n[3])
