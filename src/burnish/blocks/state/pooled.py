"""What a head reads: the states of one token after several blocks, pooled by attention.

    f = sum_l softmax_l(w^T tanh(W h^l)) h^l

h^l (B, D) is the state after block l of a sample's mask, W (R, D), w (R).

Letters: B samples, T tokens, D width, R rows of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context, current, resume
from ...core.errors import RecipeError
from ...core.followed import is_fake
from .prompts import Listener, named


class Asked(Listener):
    """Listens to a model: where the token `mask` is in each sample, (B,). RecipeError for samples
    that have none of it, or several."""

    def __init__(self, state: Any, adapter: str, mask: int):
        super().__init__(state, adapter)
        self.mask = mask

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw, here = named(module, args, kw), current()
        ids = kw.get("input_ids")
        if ids is None or here is None:
            raise RecipeError("codeprompt finds a mask in input_ids: give input_ids")
        found = ids == self.mask
        if not is_fake(ids):
            counts = {int(n) for n in found.sum(1).unique()}
            if counts != {1}:
                raise RecipeError(f"codeprompt: every sample needs one token {self.mask}, and here "
                                  f"they have {', '.join(map(str, sorted(counts)))} (truncation "
                                  "must leave the mask)")
        at = found.int().argmax(1)
        with resume(replace(here, given={**here.given, f"{self.adapter} mask": at})):
            return call(**kw)


class AtMask(Listener):
    """Listens to a block: its state of the mask (of the first token where none is named) waits for
    the head."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        h = out[0] if isinstance(out, tuple) else out
        at = context().given.get(f"{self.adapter} mask")
        one = h[:, 0] if at is None else h[torch.arange(len(h), device=h.device), at.to(h.device)]
        self.here.box.setdefault(("at mask", self.adapter), []).append(one)
        return out


class Pooled(Listener):
    """Listens to a head: it reads f in the place of what it is given. W as linears start, w zero:
    the mean of the states. One that reads the first of a sample's tokens has f for it."""

    def __init__(self, state: Any, adapter: str, width: int, rows: int):
        super().__init__(state, adapter)
        self.linear = nn.Linear(width, rows, bias=False)
        self.score = nn.Parameter(torch.zeros(rows))

    def weights(self, states: Tensor) -> Tensor:
        """(B, L): how much each block's state counts, of sum 1; states (B, L, D)."""
        seen = torch.tanh(self.linear(states.to(self.score.dtype)))
        return (seen @ self.score).softmax(1)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        x = args[0] if args else next(iter(kw.values()))
        if not (seen := self.here.box.pop(("at mask", self.adapter), [])):
            return call(*args, **kw)
        states = torch.stack(seen, 1)
        f = (self.weights(states).unsqueeze(-1) * states).sum(1).to(x.dtype)
        return call(f.unsqueeze(1) if x.dim() == 3 else f)
