"""Bottlenecks of several tasks at one site, of which a sample takes its own: some matrices may be
everybody's.

    f(h) = U_t act(D_t h + b_t) + c_t,      t the sample's entry of the key ``task``

Kept for backward: h; the rest is made again there. Letters: T tasks, D width, M bottleneck.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.call import context
from ..tape.executor import checkpoint
from .bottleneck import Bottleneck, activation


class TaskBottlenecks(nn.Module):
    """down (T, M, D), down_bias (T, M), up (T, D, M), up_bias (T, D); the half that `share` names
    has 1 in place of T. Starts as a :class:`Bottleneck` of `init`, every task alike only in what is
    shared."""

    def __init__(self, tasks: int, d: int, width: int, *, share: Literal["down", "up", "none"],
                 act: str, init: Literal["zero", "bert", "truncated"]):
        super().__init__()
        self.act = act
        made = [Bottleneck(d, width, act=act, init=init) for _ in range(tasks)]
        for half in ("down", "up"):
            mine = [getattr(b, half) for b in (made[:1] if share == half else made)]
            for name, leaf in ((half, "weight"), (f"{half}_bias", "bias")):
                value = torch.stack([getattr(linear, leaf).detach() for linear in mine])
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (h,), {})

    def run(self, h: Tensor) -> Any:
        """f itself, of h (rows, ..., D)."""
        task, x = context().by_entry("task", h)
        D, b, U, c = (p.expand(len(task), *p.shape[1:]) if len(p) == 1 else p[task.long()]
                      for p in (t.to(h.dtype) for t in (self.down, self.down_bias, self.up,
                                                        self.up_bias)))
        flat = x.flatten(1, -2)                  # every sample's states
        z = activation(self.act)(torch.baddbmm(b.unsqueeze(1), flat, D.transpose(1, 2)))
        return torch.baddbmm(c.unsqueeze(1), z, U.transpose(1, 2)).view(h.shape)

    @torch.no_grad()
    def plain(self, task: int) -> Bottleneck:
        """One task's by itself."""
        made = Bottleneck(self.down.shape[2], self.down.shape[1], act=self.act).to(self.down.device)
        for p, values in zip(made.parameters(), (self.down, self.down_bias, self.up, self.up_bias),
                             strict=True):
            p.copy_(values[min(task, len(values) - 1)])
        return made
