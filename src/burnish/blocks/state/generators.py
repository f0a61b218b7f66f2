"""What makes the rows of a prompt, where they do not train as they stand.

A generator is a module that is given the rows and what else the prompt owns, or knows whose they
are, and answers with P (L, D). Its answer is the same for every input, so that P can be kept in its
place once training is over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .prompts import Positioned


class Fused(nn.Module):
    """Rows that have looked at an edit of the embeddings, then seen in several spaces:

        F = P + softmax((P Q)(T K)^T / sqrt(D)) T,       T = A B, the edit's rows
        P* = sum_j g_j (F + (F U_j) V_j),                g = softmax(G mean(F))

    Q and K (D, fusion), U (spaces, D, R), V (spaces, R, D), G (spaces, D). fusion=0: F = P;
    spaces=1: P* = F. Start: V and G zero, so P* = P where T = 0.
    """

    def __init__(self, width: int, fusion: int, spaces: int, rank: int):
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(width, fusion) / math.sqrt(width))
                          if fusion else None for _ in range(2))
        self.U = self.V = self.G = None
        if spaces > 1:
            self.U = nn.Parameter(torch.randn(spaces, width, rank) / math.sqrt(width))
            self.V = nn.Parameter(torch.zeros(spaces, rank, width))
            self.G = nn.Parameter(torch.zeros(spaces, width))

    def forward(self, rows: Tensor, edit: Positioned) -> Tensor:
        P = rows
        if self.q is not None:
            T = edit.table()
            scores = (P @ self.q) @ (T @ self.k).t() / math.sqrt(P.shape[1])
            P = P + scores.softmax(-1) @ T
        if self.U is not None:
            P = P + torch.einsum("j,ljr,jrd->ld", self.gate(P),
                                 torch.einsum("ld,jdr->ljr", P, self.U), self.V)
        return P

    def gate(self, P: Tensor) -> Tensor:
        """g, of sum 1: how much each space counts."""
        g: Tensor = (self.G @ P.mean(0)).softmax(-1)
        return g


class Projected(nn.Module):
    """``rows W^T + b`` of rows that a prompt elsewhere owns: W (out, D) as linears start."""

    def __init__(self, source: nn.Module, width: int, out: int):
        super().__init__()
        self.__dict__["source"] = source             # of the model, no part of this module
        self.linear = nn.Linear(width, out)

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return (self.source.rows,)

    def forward(self) -> Tensor:
        made: Tensor = self.linear(self.source.rows)
        return made
