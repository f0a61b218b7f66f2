"""Several low-rank updates of one linear, weighed sample by sample by a key of the batch.

    y = s sum_e g_e drop(B_e A_e x)        g (E,) made of the sample's entry of the key

All down-projections are one product, E R wide; the weights multiply it there, before what goes up.
Kept for backward: x, which the linear keeps anyway; the E R numbers per token are made again there,
for the price of that one thin product. Letters: I in, O out, E updates, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ..tape.executor import checkpoint
from .experts import spread

Rows = tuple[tuple[int, int], ...] | None


class KeyedChains(nn.Module):
    """A (E, R, I), B (E, O, R) zero: nothing at the start. Subclasses give :meth:`gates`.

    deviation: A is normal with it, or Kaiming-uniform(sqrt 5) where it is None. dropout acts on
    what each update gives. rows: runs of outputs that it adds to where the
    linear is fused.
    """

    def __init__(self, key: str, inp: int, out: int, updates: int, rank: int, *, scale: float,
                 dropout: float, deviation: float | None = None, rows: Rows = None):
        super().__init__()
        self.key, self.out, self.rows = key, out, rows
        self.scale, self.dropout = scale, dropout
        n = out if rows is None else sum(b - a for a, b in rows)
        self.A = nn.Parameter(torch.empty(updates, rank, inp))
        self.B = nn.Parameter(torch.zeros(updates, n, rank))
        if deviation is None:
            nn.init.uniform_(self.A, -1 / math.sqrt(inp), 1 / math.sqrt(inp))
        else:
            nn.init.normal_(self.A, std=deviation)
        for p in self.parameters():
            p.burnish_decay = False

    def gates(self, entries: Tensor) -> Tensor:
        """(n, E) weights of n entries of the key."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The updates themselves, (..., O) or as many outputs as `rows` say."""
        entries, x = context().by_entry(self.key, x)
        p = self.dropout if self.training else 0.0
        z = F.linear(x, self.A.flatten(0, 1).to(x.dtype)).unflatten(-1, self.A.shape[:2])
        g = self.gates(entries).to(z.dtype) * self.scale
        z = z * g.view(len(g), *(1,) * (z.dim() - 3), -1, 1)
        B = self.B.to(z.dtype)
        if p:
            parts = [F.dropout(F.linear(z[..., e, :], B[e]), p) for e in range(len(B))]
            return torch.stack(parts).sum(0).flatten(0, 1)
        return F.linear(z.flatten(-2), B.transpose(0, 1).flatten(1)).flatten(0, 1)

    @torch.no_grad()
    def plain(self, entry: float) -> dict[str, Tensor]:
        """A (r, I) and B (O, r) of one entry's update as a chain of scale 1, without the updates
        that have no weight there."""
        g = self.gates(torch.tensor([entry], device=self.A.device))[0]
        mine = g.nonzero().flatten()
        B = self.B[mine] * (g[mine].to(self.B) * self.scale).view(-1, 1, 1)
        B = spread(B.transpose(0, 1).flatten(1).t(), self.rows, self.out).t()
        return {"A": self.A[mine].flatten(0, 1), "B": B}


class Mixed(KeyedChains):
    """Two updates with weights 1 - a and a, ``a = 1/2 + q - middle`` cut to [0, 1]."""

    def __init__(self, *args: Any, middle: float, **kw: Any):
        super().__init__(*args, **kw)
        self.middle = middle

    def gates(self, entries: Tensor) -> Tensor:
        a = (entries + 0.5 - self.middle).clamp(0, 1)
        return torch.stack([1 - a, a], 1)


class Picked(KeyedChains):
    """The update of the number that the key says, alone."""

    def gates(self, entries: Tensor) -> Tensor:
        return F.one_hot(entries.long(), len(self.A))


class Tasked(nn.Module):
    """``y = s (B_0 A_0 + B_t A_t) drop(x)``, t the task: what all tasks share, and a task's own.

    shared, rank: of the first and of the others; 0 leaves it out.
    """

    def __init__(self, inp: int, out: int, tasks: int, rank: int, shared: int, *, scale: float,
                 dropout: float, rows: Rows = None):
        super().__init__()
        self.out, self.rows, self.scale, self.dropout = out, rows, scale, dropout
        self.task = Picked("task", inp, out, tasks, rank, scale=scale, dropout=0.0, rows=rows) \
            if rank else None
        self.A0 = self.B0 = None
        if shared:
            n = out if rows is None else sum(b - a for a, b in rows)
            bound = 1 / math.sqrt(inp)
            self.A0 = nn.Parameter(torch.empty(shared, inp).uniform_(-bound, bound))
            self.B0 = nn.Parameter(torch.zeros(n, shared))
            self.A0.burnish_decay = self.B0.burnish_decay = False

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The updates themselves, (..., O) or as many outputs as `rows` say."""
        x = F.dropout(x, self.dropout, self.training and self.dropout > 0)
        parts = [] if self.task is None else [self.task.run(x)]
        if self.A0 is not None and self.B0 is not None:
            z = F.linear(x, self.A0.to(x.dtype))
            parts.append(F.linear(z, self.B0.to(z.dtype)) * self.scale)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @torch.no_grad()
    def plain(self, task: int) -> dict[str, Tensor]:
        """A and B of one task as a chain of scale 1."""
        pairs = [] if self.task is None else [tuple(self.task.plain(task).values())]
        if self.A0 is not None and self.B0 is not None:
            pairs.append((self.A0, spread((self.B0 * self.scale).t(), self.rows, self.out).t()))
        return {"A": torch.cat([A for A, _ in pairs]), "B": torch.cat([B for _, B in pairs], 1)}
