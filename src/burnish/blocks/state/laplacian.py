"""Messages of the p-Laplacian on the graph that an attention is, in a bottleneck behind it.

    Abar_ij = A_ij |sqrt(A_ij + e) (F_i - F_j) + e|^(p - 2),   e = 1e-8, added to every component
    alpha_i = 1 / (sum_j Abar_ij + 2 mu / p),   beta_i = alpha_i 2 mu / p
    F'_i = alpha_i sum_j Abar_ij F_j + beta_i F_i

A are the probabilities, F the features of the nodes, head by head. p = 2 is a mean weighted by
attention; below 2 what is alike counts more. Lengths come from products of features, so nothing of
tokens x tokens x width is made; what they cannot tell from nothing is nothing, and has no gradient.

Letters: B batch, H heads, N queries, K keys, D width, R width of the bottleneck, M = R / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import resume
from ...core.errors import RecipeError
from ..tape.executor import checkpoint
from .attending import Attending, named
from .prompts import Listener

#: e of the equation
SMALL = 1e-8
#: p is kept from here to 2
LEAST = 1.0 + 1e-3
#: the score of what is not to be seen: finite, so that no gradient is not a number
NOTHING = -1e30


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """A, (B, H, N, K), in fp32 at least."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, NOTHING)
    if mask is not None:
        scores = scores.masked_fill(~mask, NOTHING) if mask.dtype == torch.bool \
            else scores + mask.to(scores.dtype)
    return scores.softmax(-1)


def weighed(A: Tensor, F_N: Tensor, F_K: Tensor, p: Tensor) -> Tensor:
    """Abar (..., N, K) of A, which is as large, and nodes (..., N, M) and (..., K, M)."""
    M = F_N.shape[-1]
    n_N, n_K = (f.square().sum(-1) for f in (F_N, F_K))
    both = n_N.unsqueeze(-1) + n_K.unsqueeze(-2)
    square = both - 2 * F_N @ F_K.mT
    alike = square <= 8 * torch.finfo(square.dtype).eps * both
    apart = F_N.sum(-1).unsqueeze(-1) - F_K.sum(-1).unsqueeze(-2)
    w = (A + SMALL).sqrt()
    length = (w.square() * square + 2 * SMALL * w * apart).masked_fill(alike, 0) + SMALL**2 * M
    return A * length.clamp_min(SMALL**2 * M) ** ((p - 2) / 2)


def messages(A: Tensor, F_N: Tensor, F_K: Tensor, p: Tensor, mu: Tensor, *,
             own: Literal["code", "exclude"] | None = None) -> Tensor:
    """F' of the queries, (..., N, M).

    own: the queries are the last nodes of the keys, so each meets itself there: "code" as the
    equation has it, where e alone is its length and it counts for nearly all; "exclude": only by
    beta. None: the two are apart (a bipartite graph), and beta F_i lies on the other side of it.
    """
    p = p.clamp(LEAST, 2.0)
    Abar = weighed(A, F_N, F_K, p)
    if own == "exclude":
        N, K = A.shape[-2:]
        mine = torch.ones(N, K, dtype=torch.bool, device=A.device)
        Abar = Abar.masked_fill(mine.tril(K - N).triu(K - N), 0)
    rest = 2 * mu / p
    alpha = 1 / (Abar.sum(-1, keepdim=True) + rest)
    made = alpha * (Abar @ F_K)
    return made if own is None else made + alpha * rest * F_N


class Attended(Attending):
    """Listens to an attention: what it attends by waits for the linear behind it."""

    what = "an adapter behind attention"
    part = "p_adapter"

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box, key = self.here.box, ("cache", self.adapter)
        box[key] = kw.get("past_key_values")
        out = super().around(module, call, *args, **kw)
        box.pop(key, None)
        return out

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        given = named(args, kwargs)
        cache = self.here.box.get(("cache", self.adapter))
        N, K = given["query"].shape[-2], given["key"].shape[-2]
        if cache is not None and N != K and getattr(cache, "is_compileable", False):
            raise RecipeError(f"{self.part}: a cache of a fixed size holds keys behind the newest "
                              "token; write on with a dynamic one")
        self.here.box["attended", self.adapter] = given
        return func(*args, **kwargs)


class Messages(Listener):
    """Listens to the last linear O of an attention: ``y + W_up (gelu(W_gate y) * F')``, y its
    answer, F the heads of ``W_down O(V)``, V the values.

    down, gate (R, D) and up (D, R) with biases, p and m one number each, which train without weight
    decay: ``mu = 2 mu0 + mu0 tanh(m)``, m = 0 at the start. Weights N(0, 0.02), biases 0; zero: up
    too. pooled: in cross-attention nodes are the queries and so many means of neighbouring values
    (their features ``W_down O(Q)`` and ``W_down O(V)``); None in self-attention.

    Kept for backward: queries, keys, O(V), y and R numbers per token; what is tokens^2 is made
    again.
    """

    what = "an adapter behind attention"

    def __init__(self, state: Any, adapter: str, width: int, bottleneck: int, heads: int, *,
                 p: float, mu: float, self_loop: Literal["code", "exclude"], zero: bool,
                 pooled: int | None = None):
        super().__init__(state, adapter)
        self.heads, self.mu, self.self_loop, self.pooled = heads, mu, self_loop, pooled
        self.down, self.gate = (nn.Linear(width, bottleneck) for _ in range(2))
        self.up = nn.Linear(bottleneck, width)
        self.p, self.m = nn.Parameter(torch.tensor(float(p))), nn.Parameter(torch.zeros(()))
        self.p.burnish_decay = self.m.burnish_decay = False   # type: ignore[attr-defined]
        for linear in (self.down, self.gate, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if zero:
            nn.init.zeros_(self.up.weight)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = self.here.box.pop(("attended", self.adapter))
        q, k, v = (given[n] for n in ("query", "key", "value"))
        if q.shape[1] != self.heads:                 # one token whose heads stand as queries
            q = q.reshape(len(q), self.heads, -1, q.shape[-1])
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = args[0] if args else next(iter(kw.values()))
        if q.shape[0] * q.shape[2] * q.shape[1] * v.shape[3] != x.numel():
            raise RecipeError(f"p_adapter: {type(module).__name__} is given {tuple(x.shape)}, where"
                              f" an attention answered {tuple(q.shape)}: not its last linear")
        nodes = [v] if self.pooled is None else [q, v]
        with resume(self.here.aside()):              # others' branches may read elsewhere, once
            nodes = [call(t.transpose(1, 2).flatten(2)) for t in nodes]
        y = call(*args, **kw)
        scale = given.get("scale") or q.shape[-1] ** -0.5
        mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
        with torch.autocast(y.device.type, enabled=False):
            made = checkpoint(self, self.sent, (q, k, scale, mask, causal, *nodes), {})
        z = F.gelu(_linear(self.gate, y)) * made.to(y.dtype).view(*y.shape[:-1], -1)
        return y + _linear(self.up, z)

    def sent(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool,
             *nodes: Tensor) -> Tensor:
        """F', (B, N, R), in fp32 at least."""
        A = probabilities(q, k, scale, mask, causal)
        p, mu = self.p.to(A.dtype), self.mu * (2 + torch.tanh(self.m.to(A.dtype)))
        found = [_linear(self.down, t).to(A.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for t in nodes]
        if self.pooled is None:
            F_K = found[0]
            made = messages(A, F_K[..., -A.shape[-2] :, :], F_K, p, mu, own=self.self_loop)
        else:
            n = min(self.pooled, A.shape[-1])
            A, F_K = _pooled(A, n), _pooled(found[1].mT, n).mT
            made = messages(A, found[0], F_K, p, mu)
        return made.transpose(1, 2).flatten(2)


def _pooled(t: Tensor, n: int) -> Tensor:
    """(..., K) as n means of neighbours."""
    return F.adaptive_avg_pool1d(t.flatten(0, -3), n).view(*t.shape[:-1], n)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
