"""A head that reads all hidden states of a frozen network at once: no chain of side blocks.

Letters: L blocks, so L + 1 states H_l of B samples, T tokens, D numbers; S the head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.executor import checkpoint
from .prompts import Listener
from .taps import Beside, Down

_NOTHING = nn.Module()                           # what is run again has no parameters of its own


def alike(anchor: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
    """C = I + relu(X_L X_l^T) / its rows' sums, (B, T, T); tokens of padding are not looked at."""
    C = F.relu(anchor @ x.transpose(1, 2))
    if valid is not None:
        C = C * valid.unsqueeze(1).to(C.dtype)
    wide = torch.promote_types(C.dtype, torch.float32)
    C = C / (C.sum(-1, keepdim=True, dtype=wide) + 1e-8).to(C.dtype)
    return C + torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)


def mixed(anchor: Tensor, x: Tensor, share: Tensor, valid: Tensor | None) -> Tensor:
    """share C X_l."""
    return share.view(-1, 1, 1) * (alike(anchor, x, valid) @ x)


class ParallelHead(nn.Module):
    """``U relu(X_L + Norm(P sum_l b_l C_l X_l))``, ``X_l = Norm(D_l H_l)``, b the softmax over
    l < L of ``w (mean(X_L) mean(X_l))``."""

    def __init__(self, states: int, width: int, small: int):
        super().__init__()
        self.down = nn.ModuleList(Down(width, small) for _ in range(states))
        self.norm = nn.ModuleList(nn.LayerNorm(small) for _ in range(states))
        self.mix, self.mix_norm = Down(small, small), nn.LayerNorm(small)
        self.up, self.sure = Down(small, width), nn.Linear(small, 1, bias=False)

    def forward(self, states: Sequence[Tensor], valid: Tensor | None = None,
                tape: Any = None) -> Tensor:
        *below, anchor = (norm(down(h)) for h, down, norm in
                          zip(states, self.down, self.norm, strict=True))
        shares = self.shares(anchor, below, valid)
        total = torch.zeros_like(anchor)
        for x, share in zip(below, shares.unbind(1), strict=True):
            # of a layer its X is kept, none of what is T x T
            total = total + checkpoint(_NOTHING, mixed, (anchor, x, share, valid), {}, tape)
        return self.up(F.relu(anchor + self.mix_norm(self.mix(total))))

    def shares(self, anchor: Tensor, below: Sequence[Tensor], valid: Tensor | None) -> Tensor:
        """b, (B, L)."""
        top = _mean(anchor, valid)
        sure = torch.cat([self.sure(top * _mean(x, valid)) for x in below], 1)
        wide = torch.promote_types(sure.dtype, torch.float32)
        return sure.to(wide).softmax(1).to(anchor.dtype)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Over the tokens that are no padding."""
    if valid is None:
        return x.mean(1)
    v = valid.to(x.dtype)
    return (v.unsqueeze(1) @ x).squeeze(1) / v.sum(1, keepdim=True).clamp_min(1)


class Tapped(Beside):
    """Listens to one block, which runs without a graph; what it returns waits for the head.
    enter: the first block; what it is given waits as well."""

    def __init__(self, state: Any, adapter: str, enter: bool):
        super().__init__(state, adapter)
        self.enter = enter

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = args[0] if args else next(iter(kw.values()))
        args, kw = self.alone(module, given, args, kw)
        out, _ = self.quiet(module, call, args, kw)
        box, key = self.here.box, ("taps", self.adapter)
        if self.enter:
            box[key] = [given]
        box[key].append(out[0] if isinstance(out, tuple) else out)
        return out


class InPlaceOf(Listener):
    """Listens to the last norm, or to the last block where there is none: what the head makes of
    the taps is returned in place of its state.

    norm: it is a norm, which need not run.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, head: nn.Module, norm: bool):
        super().__init__(state, adapter)
        self.head, self.norm = head, norm

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = None if self.norm else call(*args, **kw)
        taps = self.here.box.pop(("taps", self.adapter))
        if taps[0].dim() != 3:
            raise RecipeError(f"{self.adapter}: the blocks hand on states of shape "
                              f"{tuple(taps[0].shape)}; a side network reads (batch, tokens, "
                              "channels)")
        valid = getattr(self.here, "valid", None)
        if valid is not None and valid.shape != taps[0].shape[:2]:
            valid = None                             # of other tokens than these
        y = self.head(taps, valid, self.state.tape)
        return (y, *out[1:]) if isinstance(out, tuple) else y
