"""Adapters whose weights are generated from what is known of a sample: its task, and the place.

    I = W2 relu(W1 [z_task; e_place] + b1) + b2          slow: one for the whole model
    D, U, gamma, beta = W^D I, W^U I, W^gamma I, W^beta I
    f(h) = gamma LN(U gelu(D h)) + beta

Letters: B samples, D width, M width of the adapter, T width of I, E width of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ..tape.executor import checkpoint
from .bottleneck import Bottleneck

#: deviation of a generator's weights at the start
SMALL = 0.01


class Source(nn.Module):
    """``I = W2 relu(W1 [z_task; e_layer; e_position] + b1) + b2``, (B, T) from task ids (B,).

    z (tasks, E) is N(0, 1), as are e_layer (layers, E) and e_position (positions, E), which are
    left out where a place is no part of I (layers = 0). W1 (hidden, E or 3 E), W2 (T, hidden)
    N(0, 0.01), biases 0.
    """

    def __init__(self, tasks: int, embedding: int, hidden: int, width: int, layers: int = 0,
                 positions: int = 0):
        super().__init__()
        self.task = nn.Embedding(tasks, embedding)
        self.layer = nn.Embedding(layers, embedding) if layers else None
        self.position = nn.Embedding(positions, embedding) if layers else None
        self.inner = nn.Linear(embedding * (3 if layers else 1), hidden)
        self.outer = nn.Linear(hidden, width)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=SMALL)
            nn.init.zeros_(linear.bias)

    def forward(self, task: Tensor, layer: int, position: int) -> Tensor:
        z = self.task(task)
        if self.layer is not None and self.position is not None:
            place = torch.cat([self.layer.weight[layer], self.position.weight[position]])
            z = torch.cat([z, place.expand(len(z), -1)], -1)
        return self.outer(F.relu(self.inner(z)))


class Heads(nn.Module):
    """Generated from I (B, T): down (B, M, D), up (B, D, M), gamma and beta (B, D). Holds
    2 M D T + 2 D T numbers, N(0, 0.01)."""

    def __init__(self, d: int, m: int, width: int):
        super().__init__()
        self.d, self.m = d, m
        for name, size in (("down", m * d), ("up", d * m), ("gamma", d), ("beta", d)):
            self.register_parameter(name, nn.Parameter(torch.randn(size, width) * SMALL))

    def forward(self, made: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down, up = F.linear(made, self.down), F.linear(made, self.up)
        return (down.view(-1, self.m, self.d), up.view(-1, self.d, self.m),
                F.linear(made, self.gamma), F.linear(made, self.beta))


class Generated(nn.Module):
    """``f(h) = gamma LN(U gelu(D h)) + beta`` with all four generated from the key ``task``.

    source, heads: the generator; who holds its tensors for others says so in `owns`, the others
    borrow them. layer, position: where this adapter stands.
    Kept for backward: h alone; backward generates and runs the adapter again.
    """

    source: Source
    heads: Heads

    def __init__(self, source: Source, heads: Heads, layer: int = 0, position: int = 0,
                 owns: tuple[str, ...] = ("source", "heads")):
        super().__init__()
        self.layer, self.position = layer, position
        for name, part in (("source", source), ("heads", heads)):
            if name in owns:
                self.add_module(name, part)
            else:
                self.__dict__[name] = part

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What others hold, for whoever runs this again in backward."""
        own = {id(p) for p in self.parameters()}
        return tuple(p for m in (self.source, self.heads) for p in m.parameters()
                     if id(p) not in own)

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (h,), {})

    def run(self, h: Tensor) -> Any:
        """The adapter itself: f of h (B, ..., D)."""
        task = context().per_row("task", h)
        D, U, gamma, beta = (t.to(h.dtype) for t in self.weights(task))
        x = h.reshape(len(task), -1, h.shape[-1])
        y = F.gelu(x @ D.transpose(1, 2)) @ U.transpose(1, 2)
        y = F.layer_norm(y, y.shape[-1:]) * gamma.unsqueeze(1) + beta.unsqueeze(1)
        return y.to(h.dtype).view(h.shape)

    def weights(self, task: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(down, up, gamma, beta) for task ids (B,)."""
        return self.heads(self.source(task, self.layer, self.position))

    @torch.no_grad()
    def plain(self, task: int) -> Bottleneck:
        """The adapter of one task by itself."""
        made = stored(self.heads.d, self.heads.m).to(self.heads.down.device)
        values = self.weights(torch.tensor([task], device=self.heads.down.device))
        norm: Any = made.norm_out
        for p, value in zip((made.down.weight, made.up.weight, norm.weight, norm.bias), values,
                            strict=True):
            p.data = value[0].clone()
        return made


def stored(d: int, m: int) -> Bottleneck:
    """The form of an adapter that was generated once."""
    return Bottleneck(d, m, act="gelu", bias=False, norm="out")
