"""Tokens of a block that are merged between its attention and its MLP, so that fewer go on.

    x <- x + Attn(Norm x);   the r most alike pairs become one token each;   x <- x + MLP(Norm x)

Tokens at even places look for the one most like them among those at odd places, by keys averaged
over heads, at unit length; the r strongest edges merge. A token stands for as many as its size s:
X = s x is summed, s too, and x = X / s, a mean of all that it stands for.

A block runs whole, twice, each time with one of its halves answering zero: whatever stands around
the halves (scales, drop path, what is added to them) is the block's own.

Letters: B batch, N tokens, D width, r pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from .attending import SDPA
from .attending import named as attention_arguments
from .prompts import Listener


@dataclass(frozen=True)
class Pairs:
    """Which tokens merge: source (B, r) and rest (B, A - r), places among the even tokens; to
    (B, r), the place of each source's partner among the odd ones; protected tokens come first."""

    source: Tensor
    rest: Tensor
    to: Tensor
    protected: int

    def merged(self, X: Tensor, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """(B, N - r, D) of (B, N, D). change: of the sources and their partners, (B, r, D) each,
        what is added to the partners instead of the sources."""
        even, odd = X[:, ::2], X[:, 1::2]
        moved, at = _rows(even, self.source), self.to.unsqueeze(-1).expand(-1, -1, X.shape[-1])
        if change is not None:
            moved = change(moved, odd.gather(1, at))
        odd = odd.scatter_add(1, at, moved)
        stay = _rows(even, self.rest)
        n, m = (self.protected + 1) // 2, self.protected // 2
        if not m:                                    # at most a class token, which comes first
            return torch.cat([stay, odd], 1)
        firsts = [t for i in range(n) for t in (stay[:, i : i + 1], odd[:, i : i + 1][:, : i < m])]
        return torch.cat([*firsts, stay[:, n:], odd[:, m:]], 1)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def pairs(metric: Tensor, r: int, protected: int) -> Pairs:
    """The r strongest edges of a metric (B, N, h); of the first `protected` tokens none merges.
    r is cut where there are not as many."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = metric[:, ::2], metric[:, 1::2]
    r = max(0, min(r, (metric.shape[1] - protected) // 2))
    n, m = (protected + 1) // 2, protected // 2
    scores = even @ odd.mT
    scores[:, :n] = -torch.inf
    scores[..., :m] = -torch.inf
    best, to = scores.max(-1)
    order = best.argsort(-1, descending=True)
    return Pairs(order[:, :r], order[:, r:].sort(-1).values, to.gather(1, order[:, :r]), protected)


class Modulated(nn.Module):
    """What PYRA adds in the place of a source s with partner t, both times their size:

        s + (s * d_D) * d_T,  P = Norm(s + t),  d_D = 2 sigmoid(a^T P),  d_T = 2 sigmoid(P b^T) - 1

    a (r, 1) U(-1, 1), b (1, D) zeros: d_T = 0, and s is added, at the start. r + 3 D numbers. Rows
    of a go by the strength of the edge.
    """

    def __init__(self, r: int, width: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, 1).uniform_(-1, 1))
        self.b = nn.Parameter(torch.zeros(1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, source: Tensor, partner: Tensor) -> Tensor:
        like, norm = source.dtype, self.norm
        P = F.layer_norm(source + partner, norm.normalized_shape, norm.weight.to(like),
                         norm.bias.to(like), norm.eps)
        a, b = self.a[: source.shape[1]].to(like), self.b.to(like)
        d_D = 2 * torch.sigmoid(a.t() @ P)
        d_T = 2 * torch.sigmoid(P @ b.t()) - 1
        return source + (source * d_D) * d_T


class Half(Listener):
    """Listens to one half of a block, and answers zero while the other is asked for."""

    what = "merging of tokens"

    def __init__(self, state: Any, adapter: str, name: str):
        super().__init__(state, adapter)
        self.name = name

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        asked = self.here.box.get(("half", self.adapter))
        if asked is None or asked[0] == self.name:
            out = call(*args, **kw)
            if asked is not None and isinstance(out, tuple):
                asked[2][self.name] = out[1:]
            return out
        zero = asked[1].new_zeros(asked[1].shape)
        rest = asked[2].get(self.name)
        return zero if rest is None else (zero, *rest)


class Merging(Listener):
    """Listens to one block, whose halves hold a :class:`Half` each ("attention", "mlp").

    r: pairs. change: a module as in :meth:`Pairs.merged`, or None (ToMe). proportional: log s is
    added to the scores of keys. first, last: where in the stack, and who hands sizes on.
    """

    what = "merging of tokens"
    part = "pyra"

    def __init__(self, state: Any, adapter: str, r: int, change: nn.Module | None, *,
                 protected: int, proportional: bool, first: bool, last: bool):
        super().__init__(state, adapter)
        self.r, self.protected, self.proportional = r, protected, proportional
        self.first, self.last, self.change = first, last, change

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        x = args[0] if args else next(iter(kw.values()))
        if x.dim() != 3:
            raise RecipeError(f"{self.part}: a block is given {tuple(x.shape)}; expected (batch, "
                              "tokens, width)")
        box, key = self.here.box, ("sizes", self.adapter)
        sizes = box.pop(key, None)
        if sizes is None and not self.first:
            raise RecipeError(f"{self.part}: {type(module).__name__} runs without the block before "
                              "it, which says what its tokens stand for; drop the checkpointing")
        if sizes is not None and sizes.shape[:2] != x.shape[:2]:
            raise RecipeError(f"{self.part}: a block is given {x.shape[1]} tokens where the one "
                              f"before it left {sizes.shape[1]}")
        keys: list[Tensor] = []

        def attend(func: Callable[..., Tensor], a: tuple, k: dict) -> Tensor:
            given = attention_arguments(a, k)
            keys.append(given["key"].detach())
            if sizes is not None and self.proportional:
                given["attn_mask"] = _with(given.get("attn_mask"), sizes)
            return func(**given)

        rests: dict[str, tuple] = {}
        with self._only("attention", x, rests), self.state.tape.answering({SDPA: attend}):
            out = call(*args, **kw)
        x = out[0] if isinstance(out, tuple) else out
        if len(keys) != 1:
            raise RecipeError(f"{self.part}: {type(module).__name__} computed its attention without"
                              " one F.scaled_dot_product_attention; load the model with "
                              "attn_implementation='sdpa'")
        if self.r:
            x, sizes = self.merge(x, keys[0].mean(1), sizes)
        if not self.last:
            box[key] = x.new_ones(*x.shape[:2], 1) if sizes is None else sizes
        with self._only("mlp", x, rests):
            return call(x, *args[1:], **kw) if args else call(**{**kw, next(iter(kw)): x})

    def merge(self, x: Tensor, metric: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fewer tokens and their sizes."""
        sizes = x.new_ones(*x.shape[:2], 1) if sizes is None else sizes
        found = pairs(metric, self.r, self.protected)
        X = found.merged(x * sizes, self.change)
        sizes = found.merged(sizes)
        return X / sizes, sizes

    @contextmanager
    def _only(self, name: str, like: Tensor, rests: dict[str, tuple]) -> Any:
        """Inside, the other half answers zero, as large as `like`."""
        box, key = self.here.box, ("half", self.adapter)
        box[key] = (name, like, rests)
        try:
            yield
        finally:
            box.pop(key, None)


def _with(mask: Tensor | None, sizes: Tensor) -> Tensor:
    """A mask and log s of every key, (B, 1, 1, N) or more."""
    more = sizes.log().mT.unsqueeze(1)
    if mask is None:
        return more
    return more.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask + more
