"""Heads over two views of one input: a large model's states, and a small model's own.

    z_j   mean over a sample's tokens of what block j returns       u   of what the small model does
    y = sum_j w_j head_j([P_j z_j ; u])

Of a block one row a sample is kept, whatever its tokens. Letters: B samples, T tokens, D width of
the large model, S of the small one, P of a projection, C classes, J blocks that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.executor import no_grad
from .prompts import Listener
from .sideblocks import Plain
from .taps import Beside, Down


def pooled(h: Tensor, valid: Tensor | None) -> Tensor:
    """(B, D): the mean over the tokens that are no padding."""
    if valid is None:
        return h.mean(1)
    v = valid.to(h.dtype)
    return (v.unsqueeze(1) @ h).squeeze(1) / v.sum(1, keepdim=True).clamp_min(1)


class Small(nn.Module):
    """A transformer of its own on the states (B, T, D) that go into the large one: (B, S)."""

    def __init__(self, width: int, small: int, layers: int, heads: int):
        super().__init__()
        self.down = Down(width, small)
        self.blocks = nn.ModuleList(Plain(small, heads, 4 * small) for _ in range(layers))
        self.norm = nn.LayerNorm(small)

    def forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        x = self.down(h)
        mask = None if valid is None else valid.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return pooled(self.norm(x), valid)

    @staticmethod
    def count(width: int, small: int, layers: int) -> int:
        """Trainable numbers."""
        return width * small + small + layers * (12 * small * small + 13 * small) + 2 * small


class Heads(nn.Module):
    """``sum_j w_j head_j([P_j z_j ; u])``; w = 1 / J, or with `weighed` the softmax of J numbers
    that train (equal at the start)."""

    def __init__(self, states: int, width: int, projected: int, small: int, classes: int,
                 weighed: bool):
        super().__init__()
        self.project = nn.ModuleList(Down(width, projected) for _ in range(states))
        self.heads = nn.ModuleList(Down(projected + small, classes) for _ in range(states))
        self.shares = nn.Parameter(torch.zeros(states)) if weighed else None
        if self.shares is not None:
            self.shares.burnish_decay = False

    def forward(self, z: Sequence[Tensor], u: Tensor) -> Tensor:
        rows = torch.stack([head(torch.cat([project(x), u], -1))
                            for x, project, head in zip(z, self.project, self.heads, strict=True)])
        if self.shares is None:
            return rows.mean(0)
        return torch.einsum("j,jbc->bc", self.shares.softmax(0).to(rows.dtype), rows)


class Viewed(Beside):
    """Listens to one block: what it returns waits, one row a sample, for the heads.

    small: of the first block, on what that is given. reads: False where no head reads the block.
    frozen: it runs without a graph.
    """

    what = "a second view"

    def __init__(self, state: Any, adapter: str, small: Small | None, reads: bool, frozen: bool):
        super().__init__(state, adapter)
        self.small, self.reads, self.frozen = small, reads, frozen

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = args[0] if args else next(iter(kw.values()))
        if given.dim() != 3:
            raise RecipeError(f"{self.adapter}: the blocks hand on states of shape "
                              f"{tuple(given.shape)}; a second view reads (batch, tokens, "
                              "channels)")
        valid = getattr(self.here, "valid", None)
        if valid is not None and valid.shape != given.shape[:2]:
            valid = None                             # of other tokens than these
        box, key = self.here.box, ("views", self.adapter)
        if self.small is not None:
            box[key] = [self.small(given.detach() if self.frozen else given, valid)]
        if self.frozen:
            args, kw = self.alone(module, given, args, kw)
            out = no_grad(module, call, args, kw)
        else:
            self._runs_once(module)
            out = call(*args, **kw)
        if self.reads:
            box[key].append(pooled(out[0] if isinstance(out, tuple) else out, valid))
        return out


class Answers(Listener):
    """Listens to the task head, which need not run: the heads over both views answer for it."""

    what = "a second view"

    def __init__(self, state: Any, adapter: str, heads: Heads):
        super().__init__(state, adapter)
        self.heads = heads

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        u, *z = self.here.box.pop(("views", self.adapter))
        return self.heads(z, u)
