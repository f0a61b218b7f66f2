"""What makes the rows of a prompt, where they do not train as they stand.

A generator is a module that is given the rows and what else the prompt owns, or knows whose they
are, and answers with P (L, D). Its answer is the same for every input, so that P can be kept in its
place once training is over.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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
    """``rows W^T + b`` of rows that a prompt elsewhere owns: W (out, D) as linears start, or those
    of a linear that another place owns."""

    def __init__(self, source: nn.Module, width: int, out: int, linear: nn.Linear | None = None):
        super().__init__()
        self.__dict__["source"] = source             # of the model, no part of this module
        if linear is None:
            self.linear = nn.Linear(width, out)
        else:
            self.__dict__["linear"] = linear

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return (self.source.rows, *(() if "linear" in self._modules else self.linear.parameters()))

    def forward(self) -> Tensor:
        made: Tensor = self.linear(self.source.rows)
        return made


class Block(nn.Module):
    """A transformer of one block and one head on rows of width W, whose norms come before:

        x += softmax(q k^T / sqrt(W)) v,  x += MLP(Norm x),   q, k and v of Norm x, MLP of 4 W
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def mixed(self, x: Tensor) -> Tensor:
        """(rows, W) that have looked at each other."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj((q @ k.t() / math.sqrt(x.shape[1])).softmax(-1) @ v)
        made: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return made


class Unified(Block):
    """Rows of two towers that have looked at each other in a transformer of one block and one head:

        x = [U_0 A_0 + a_0; U_1 A_1 + a_1],  x += softmax(q k^T / sqrt(W)) v,  x += MLP(Norm x)

    q, k and v of Norm x, with a projection behind; the two runs of x then go to P_i = x B_i + b_i.
    U_0 (L, D_0) and U_1 (L, D_1) begin N(0, 0.02^2), the rest as linears start; MLP of 4 W.
    """

    def __init__(self, length: int, widths: tuple[int, int], width: int):
        super().__init__(width)
        self.rows = nn.ParameterList(torch.randn(length, d) * 0.02 for d in widths)
        self.enter = nn.ModuleList(nn.Linear(d, width) for d in widths)
        self.leave = nn.ModuleList(nn.Linear(width, d) for d in widths)

    def forward(self, side: int) -> Tensor:
        x = self.mixed(torch.cat([enter(U) for enter, U in zip(self.enter, self.rows,
                                                               strict=True)]))
        made: Tensor = self.leave[side](x.chunk(2)[side])
        return made


class Side(nn.Module):
    """One side's rows of a :class:`Unified` bank. Who `owns` it holds it, the other borrows it;
    each makes its own, since a tower may be run without the other."""

    def __init__(self, bank: Unified, side: int, owns: bool):
        super().__init__()
        self.side = side
        if owns:
            self.bank = bank
        else:
            self.__dict__["bank"] = bank

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return () if "bank" in self._modules else tuple(self.bank.parameters())

    def forward(self) -> Tensor:
        made: Tensor = self.bank(self.side)
        return made


class Common(Block):
    """What makes rows of two towers out of the same ones, (L, W): a linear for each tower, behind a
    :class:`Block` where it `attends`. As linears start."""

    def __init__(self, width: int, outs: tuple[int, int], attends: bool):
        if attends:
            super().__init__(width)
        else:
            nn.Module.__init__(self)
        self.attends = attends
        self.leave = nn.ModuleList(nn.Linear(width, out) for out in outs)

    def forward(self, rows: Tensor, side: int) -> Tensor:
        made: Tensor = self.leave[side](self.mixed(rows) if self.attends else rows)
        return made


class OfCommon(nn.Module):
    """One side's rows of common ones: of its own, or of another place's (`source`). Who `owns` what
    makes them of these holds it, the others borrow it."""

    def __init__(self, common: Common, side: int, rows: Tensor | None,
                 source: OfCommon | None = None, owns: bool = False):
        super().__init__()
        self.side = side
        if owns:
            self.common = common
        else:
            self.__dict__["common"] = common
        if source is None:
            self.rows = nn.Parameter(rows)
        else:
            self.__dict__["rows_of"] = source

    @property
    def common_rows(self) -> Tensor:
        """Those of width W."""
        source = self.__dict__.get("rows_of")
        rows: Tensor = self.rows if source is None else source.rows
        return rows

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        own = () if "rows_of" not in self.__dict__ else (self.common_rows,)
        return (*own, *(() if "common" in self._modules else self.common.parameters()))

    def forward(self) -> Tensor:
        made: Tensor = self.common(self.common_rows, self.side)
        return made


class Space(nn.Module):
    """Rows R (L, W) that several places of two towers are made of. rank > 0: and for each tower the
    matrix (out, W) that its places share, with the shift that each begins with; as linears start.
    """

    def __init__(self, length: int, width: int, outs: tuple[int, int], rank: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width) * 0.02)
        drawn = [nn.Linear(width, out) for out in outs] if rank else []
        self.shared = nn.ParameterList(m.weight for m in drawn)
        self.__dict__["shifts"] = [m.bias.detach() for m in drawn]


class Aligned(nn.Module):
    """``R F^T + b``, F (out, W): of its own, or (``rank > 0``) ``shared + A B``, A (out, rank) as
    a matrix from `rank` starts, B (rank, W) zero. Who `owns` the space holds it, others borrow it.
    """

    def __init__(self, space: Space, side: int, out: int, rank: int, owns: bool):
        super().__init__()
        if owns:
            self.space = space
        else:
            self.__dict__["space"] = space
        self.side, width = side, space.rows.shape[1]
        self.linear = None if rank else nn.Linear(width, out)
        if rank:
            self.A = nn.Parameter(torch.empty(out, rank).uniform_(-1, 1) * rank ** -0.5)
            self.B = nn.Parameter(torch.zeros(rank, width))
            self.bias = nn.Parameter(space.shifts[side].clone())

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return () if "space" in self._modules else tuple(self.space.parameters())

    def forward(self) -> Tensor:
        R = self.space.rows
        if self.linear is not None:
            own: Tensor = self.linear(R)
            return own
        return F.linear(R, self.space.shared[self.side] + self.A @ self.B, self.bias)
