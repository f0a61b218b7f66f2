"""Rows in front of a text that all tasks share, each with a low-rank factor of its own.

    P_t = P * (U_t V_t)      P (L, D), U_t (L, R), V_t (R, D), the product entry by entry

Letters: B batch, L rows added, D width, T tasks, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context
from .prompts import Prepended


class TaskRows(Prepended):
    """``[P_t; E(x)]``, t the task of the sample (key ``task``; one task needs no key).

    U (T, L, R), V (T, R, D): at the start ``U_t V_t`` is 1 everywhere, so that every task has P;
    of further components U is small and V nothing, so that each can become another.
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor, causal: bool, stay: bool,
                 tasks: int, rank: int):
        super().__init__(state, adapter, rows, causal, stay)
        L, D = rows.shape
        self.U = nn.Parameter(torch.randn(tasks, L, rank, device=rows.device) * 0.02)
        self.V = nn.Parameter(torch.zeros(tasks, rank, D, device=rows.device))
        with torch.no_grad():
            self.U[..., 0] = 1.0
            self.V[:, 0] = 1.0

    def made_for(self, x: Tensor) -> Tensor:
        if len(self.U) == 1:
            return self.rows * (self.U[0] @ self.V[0])
        task = context().per_row("task", x).long()
        return self.rows * (self.U[task] @ self.V[task])

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: these."""
        return {n: p.detach() for n, p in self.named_parameters()}

    @torch.no_grad()
    def for_one(self, task: int | None) -> dict[str, Tensor]:
        """rows, U and V for one task, this one or (None) one that begins at the mean of all."""
        U, V = (t.mean(0, keepdim=True) if task is None else t[task : task + 1]
                for t in (self.U, self.V))
        return {"rows": self.rows, "U": U, "V": V}

    @torch.no_grad()
    def plain(self, task: int | None) -> dict[str, Tensor]:
        """The rows of that task, (L, D)."""
        one = self.for_one(task)
        return {"rows": one["rows"] * (one["U"][0] @ one["V"][0])}
