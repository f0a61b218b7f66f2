"""The states below the last blocks of a frozen network, gathered into the one that those read.

The blocks below run without a graph and are tapped; the last ones run with one, on the gathered
state. A token is gathered from its own states alone, so that what is written on word by word, from
a key-value cache, is what would be read at once.

Letters: K + 1 states H_i of D numbers a token; S, the width they are gathered at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tape.executor import checkpoint
from .taps import Beside, Down

#: tokens that are gathered at a time: all their X, side by side, are K S numbers each
PIECE = 2048


def redundancy(x: Tensor) -> Tensor:
    """``r_i = sum_j relu(cos(X_i, X_j))``, (..., K) of (..., K, S): 1 where a state is like no
    other. A state of zeros, which is not even like itself, has 1 too."""
    unit = F.normalize(x, dim=-1)
    return F.relu(unit @ unit.transpose(-1, -2)).sum(-1).clamp_min(1)


class Norm(nn.LayerNorm):
    """In the dtype of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype),
                            self.bias.to(x.dtype), self.eps)


class Gather(nn.Module):
    """``A = sum_{i<K} o_i X_i + X_K``, ``X_i = Norm(Z_i)``: of the shallow states those that the
    deepest, X_K, finds sure, and less of each the more there are like it,
    ``o_i ~ relu(w (X_i * X_K) + b) / r_i``, their sum 1 (0 where none is sure).

    One shallow state has nothing to share with: it counts whole, and there is no w.
    """

    def __init__(self, states: int, small: int):
        super().__init__()
        self.norm = nn.ModuleList(Norm(small) for _ in range(states))
        self.sure = Down(small, 1) if states > 2 else None

    def forward(self, *narrow: Tensor) -> Tensor:
        *shallow, guide = (norm(z) for z, norm in zip(narrow, self.norm, strict=True))
        if self.sure is None:
            return shallow[0] + guide
        x = torch.stack(shallow, -2)
        return (self.shares(x, guide).unsqueeze(-2) @ x).squeeze(-2) + guide

    def shares(self, x: Tensor, guide: Tensor) -> Tensor:
        """o, (..., K)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        sure = F.relu(self.sure(x * guide.unsqueeze(-2)).squeeze(-1)).to(wide)
        o = sure / redundancy(x.to(wide))
        return (o / o.sum(-1, keepdim=True).clamp_min(1e-12)).to(x.dtype)


class Early(nn.Module):
    """``dropout(Norm(U relu(A))) + tanh(g / tau) H_K``, A gathered from ``Z_i = D_i H_i``; g a
    scalar, 0 at the start."""

    def __init__(self, states: int, width: int, small: int, dropout: float = 0.0, *,
                 tau: float = 0.1):
        super().__init__()
        self.down = nn.ModuleList(Down(width, small) for _ in range(states))
        self.gather = Gather(states, small)
        self.up, self.norm = Down(small, width), Norm(width, eps=1e-12)
        self.stay, self.dropout, self.tau = nn.Parameter(torch.zeros(())), dropout, tau
        self.stay.burnish_decay = False

    def forward(self, states: Sequence[Tensor], tape: Any = None) -> Tensor:
        top = states[-1]
        narrow = [down(h).flatten(0, -2).to(top.dtype)       # Mamba's first is narrower
                  for h, down in zip(states, self.down, strict=True)]
        pieces = zip(*(z.split(PIECE) for z in narrow), strict=True)
        # of a state Z is kept, nothing that its norm, its likeness and its share are made of
        A = torch.cat([checkpoint(self.gather, self.gather, piece, {}, tape) for piece in pieces])
        made = self.norm(self.up(F.relu(A))).view(top.shape)
        gate = torch.tanh(self.stay / self.tau).to(top.dtype)
        return F.dropout(made, self.dropout, self.training) + gate * top


class Late(Beside):
    """Listens to one of the last blocks, which runs in the graph. head: the block is the first of
    them, and what the head makes of the states tapped below stands in place of what it is given."""

    def __init__(self, state: Any, adapter: str, head: nn.Module | None):
        super().__init__(state, adapter)
        self.head = head

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if self.head is None:
            args, kw = self.uncached(args, kw)
            return call(*args, **kw)
        name, given = (None, args[0]) if args else next(iter(kw.items()))
        args, kw = self.alone(module, given, args, kw)
        y = self.head(self.here.box.pop(("taps", self.adapter)), self.state.tape)
        return call(y, *args[1:], **kw) if name is None else call(**{**kw, name: y})
