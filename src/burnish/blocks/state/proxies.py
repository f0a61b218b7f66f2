"""Proxies of classes, made by a second pass through the model with rows of the samples' classes.

    v_i = (LN(x_i) W^T + b) / || . ||      x_i what the head reads of sample i in that pass
    h   = c_y, then h <- GRU(v_i, h) over the samples i of class y, in their order
    z, r = sigmoid(v W_zr + h U_zr + b_zr),   n = relu(v W_n + r (h U_n) + b_n),
    GRU(v, h) = (1 - z) n + z h
    c_y <- h / ||h||,                      pi_y = norm(rho b_y + (1 - rho) c_y)

The pass is told by a key of the call, :data:`CLASSES`. Letters: B samples, C classes, L rows, D
width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from .prompts import Listener, Tokens

#: of the call: the class of each sample, in the pass that makes proxies; absent in others
CLASSES = "classes of the pass that makes proxies"


def proxies_wanted() -> bool:
    """Is this the pass that makes proxies?"""
    return CLASSES in context().given


class Embedding(Tokens):
    """Rows of a block that stand aside in the pass that makes proxies."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return call(*args, **kw) if proxies_wanted() else super().around(module, call, *args, **kw)


class OfClass(Tokens):
    """Rows (C, L, D), of which each sample has those of its class in the pass that makes proxies.

    resident=False: they stay in the host's memory, wherever the model goes, and with them their
    gradient and what an optimizer holds of them; a batch takes its samples' rows to where it is.
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor, *, after: int,
                 resident: bool = True):
        super().__init__(state, adapter, rows.shape[1], rows, after=after, enter=True, leave=True)
        self.resident = resident

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().around(module, call, *args, **kw) if proxies_wanted() else call(*args, **kw)

    def made_for(self, x: Tensor) -> Tensor:
        assert self.rows is not None
        mine = context().per_row(CLASSES, x).to(self.rows.device)
        return self.rows[mine].to(x.device)

    def finished(self) -> dict[str, Tensor]:
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.resident:
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: t.to(fn(t[:0]).dtype), recurse)


class Normed(Listener):
    """Listens to a head: it reads LN(x), except in the pass that makes proxies."""

    def __init__(self, state: Any, adapter: str, width: int):
        super().__init__(state, adapter)
        self.norm = nn.LayerNorm(width)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if proxies_wanted():
            return call(*args, **kw)
        return call(_normed(self.norm, args[0]).to(args[0].dtype), *args[1:], **kw)


class Proxies(Listener):
    """Listens to a head: in the pass that makes proxies it answers v, unnormed, in its place.
    Owns what makes proxies of v."""

    def __init__(self, state: Any, adapter: str, classes: int, width: int, embed: int,
                 seed: int = 0):
        super().__init__(state, adapter)
        self.seed = seed
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, embed)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.cell = ReluGru(embed)
        self.bias = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, embed)) / 8)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not proxies_wanted():
            return call(*args, **kw)
        x = args[0]
        return F.linear(_normed(self.norm, x), self.linear.weight, self.linear.bias).to(x.dtype)

    def start(self) -> Tensor:
        """c (C, E) before the first batch, in fp32 at least; the same for the same seed."""
        g = torch.Generator().manual_seed(self.seed)
        (C, E), b = self.bias.shape, self.bias
        c = torch.rand(C, E, generator=g, dtype=torch.float32, device="cpu") * 2 - 1
        return F.normalize(c.to(b.device, torch.promote_types(b.dtype, torch.float32)), dim=1)

    def finished(self) -> dict[str, Tensor]:
        return {}


class ReluGru(nn.Module):
    """GRU(v, h) above, of width E: W, U (3, E, E) and b (3, E), of z, r and n."""

    def __init__(self, width: int):
        super().__init__()
        self.W, self.U = (nn.Parameter(torch.stack(
            [nn.init.xavier_uniform_(torch.empty(width, width)) for _ in "zrn"])) for _ in "WU")
        self.b = nn.Parameter(torch.zeros(3, width))

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        W, U, b = (t.to(h.dtype) for t in (self.W, self.U, self.b))
        a, c = v @ W + b.unsqueeze(1), h @ U
        z, r = torch.sigmoid(a[0] + c[0]), torch.sigmoid(a[1] + c[1])
        return (1 - z) * F.relu(a[2] + r * c[2]) + z * h


def gathered(cell: Callable[[Tensor, Tensor], Tensor], v: Tensor, labels: Tensor,
             container: Tensor) -> Tensor:
    """(C, E) the container, with the classes that are there read into, every row of length 1.
    v: (B, E), of length 1. Samples of a class may stand anywhere in the batch."""
    there, mine = labels.unique(return_inverse=True)
    order = mine.argsort(stable=True)
    counts = torch.bincount(mine)
    first = counts.cumsum(0) - counts
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order), device=order.device) - first[mine[order]]
    h = container[there]
    for t in range(int(counts.max())):
        now = (turn == t).nonzero().squeeze(1)
        at = mine[now]
        h = h.index_copy(0, at, cell(v[now], h[at]))
    return F.normalize(container.index_copy(0, there, h), dim=1)


def anchored(e: Tensor, proxies: Tensor, labels: Tensor, alpha: float, delta: float) -> Tensor:
    """Proxy-Anchor, of cosines s of embeddings e (B, E) and proxies (C, E):

        mean_y log(1 + sum_{i of y} exp(-alpha (s_iy - delta)))
        + mean_y log(1 + sum_{i not of y} exp(alpha (s_iy + delta)))
    """
    s = F.normalize(e, dim=1) @ F.normalize(proxies, dim=1).t()
    own = labels.unsqueeze(1) == torch.arange(len(proxies), device=labels.device)
    none = s.new_zeros(1, len(proxies))

    def mean(scores: Tensor, which: Tensor) -> Tensor:
        return torch.cat([scores.masked_fill(~which, float("-inf")), none]).logsumexp(0).mean()

    return mean(-alpha * (s - delta), own) + mean(alpha * (s + delta), ~own)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype))
