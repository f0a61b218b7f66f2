"""A low-rank update of one linear whose factors are averages of an inventory, task by task.

    w_s = sigma(Z_t,s) / sum sigma(Z_t,s)        slice s of A_t = sum_m w_s,m A_m, of B_t likewise
    y = s B_t A_t x

The factors are averaged before they are multiplied: the update of a task has the rank of one skill,
and costs what one costs. Slices are of A's inputs and of B's outputs, one per head. Kept for
backward: x, which the linear keeps anyway; the factors of a batch are averaged there again.
Letters: I in, O out, M skills, R rank, T tasks, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..tape.executor import checkpoint
from .experts import spread

Rows = tuple[tuple[int, int], ...] | None


class Skills(nn.Module):
    """A (M, R, I), B (M, O, R) zero, Z (T, H, M) uniform in +-1e-3: nothing at the start.

    noisy: in training every sample draws a relaxed Bernoulli in place of each sigma. routed: the
    skills are frozen, and the logits alone train. rate: of the logits, over that of the skills. One
    task needs no key. rows: runs of outputs
    that it adds to where the linear is fused.
    """

    def __init__(self, inp: int, out: int, skills: int, rank: int, tasks: int, heads: int, *,
                 scale: float, noisy: bool = False, routed: bool = False, rows: Rows = None,
                 rate: float = 1.0):
        super().__init__()
        self.out, self.rows, self.scale, self.noisy = out, rows, scale, noisy
        self.empty = routed                      # perhaps: the first training forward looks
        n = out if rows is None else sum(b - a for a, b in rows)
        bound = 1 / math.sqrt(inp)
        self.A = nn.Parameter(torch.empty(skills, rank, inp).uniform_(-bound, bound),
                              requires_grad=not routed)
        self.B = nn.Parameter(torch.zeros(skills, n, rank), requires_grad=not routed)
        self.Z = nn.Parameter(torch.empty(tasks, heads, skills).uniform_(-1e-3, 1e-3))
        for p in self.parameters():
            p.burnish_decay = False
        self.Z.burnish_lr = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.empty and self.training and type(self.B) is nn.Parameter and not self.B.is_meta:
            if not self.B.any():
                raise RecipeError("gates that train alone weigh skills that exist, and these are "
                                  "nothing: begin from trained ones (poly's lifecycle)")
            self.empty = False
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The update itself, (..., O) or as many outputs as `rows` say."""
        Z = self.Z
        task, parts = torch.zeros(1, dtype=torch.long, device=x.device), x.unsqueeze(0)
        if len(Z) > 1:
            task, parts = context().by_entry("task", x)
        noisy = self.noisy and self.training
        if noisy and len(task) == 1:             # every sample draws
            n = (context().samples or (1,))[0]
            task, parts = task.expand(n), x.unflatten(0, (n, -1))
        once = len(task) > len(Z) and not noisy  # every task's factors, or each sample's
        A, B = self.factors(Z if once else Z[task.long()], noisy)
        if once:
            A, B = A[task.long()], B[task.long()]
        z = parts.flatten(1, -2) @ A.to(x.dtype).transpose(1, 2)
        y = z @ B.to(x.dtype).transpose(1, 2) * self.scale
        return y.view(*x.shape[:-1], -1)

    def factors(self, Z: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """(n, R, I) and (n, O, R) of n rows of logits (n, H, M)."""
        if noisy:
            Z = Z + torch.rand_like(Z).logit()
        w = torch.sigmoid(Z)
        w = w / (w.sum(-1, keepdim=True) + 1e-12)
        H = Z.shape[1]
        A = torch.einsum("nhm,mrhi->nrhi", w, self.A.unflatten(2, (H, -1)))
        B = torch.einsum("nhm,mhor->nhor", w, self.B.unflatten(1, (H, -1)))
        return A.flatten(2), B.flatten(1, 2)

    @torch.no_grad()
    def for_one(self, task: int | None) -> dict[str, Tensor]:
        """A, B and Z for one task, this one or (None) one whose skills weigh alike."""
        row = torch.zeros_like(self.Z[:1]) if task is None else self.Z[task : task + 1]
        return {"A": self.A, "B": self.B, "Z": row}

    @torch.no_grad()
    def plain(self, task: int | None) -> dict[str, Tensor]:
        """A (R, I) and B (O, R) of that task as a chain of scale 1."""
        A, B = self.factors(self.for_one(task)["Z"], noisy=False)
        return {"A": A[0], "B": spread((B[0] * self.scale).t(), self.rows, self.out).t()}
