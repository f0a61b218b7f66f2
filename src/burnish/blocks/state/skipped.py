"""A block that is left out: an adapter stands in its place.

    x <- block(x),   or where it is skipped   x <- x + f(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.followed import is_fake
from ..tape.executor import _uncached, no_grad
from ..tape.replay import replay, rng_state
from .prompts import Listener, named


class Skippable(Listener):
    """Listens to one block. skipped: a buffer, so that a file says which were left out.

    What a block answers beside its state is learned from a run of it: of a block that has not run
    yet, one without a graph. RecipeError for blocks that hand more than their state on to others.
    A key-value cache gets one zero per token in the place of a skipped block's keys, so that it
    counts its tokens.
    """

    what = "skipping of blocks"
    skipped: Tensor

    def __init__(self, state: Any, adapter: str, module: nn.Module):
        super().__init__(state, adapter)
        self.f = module
        self.register_buffer("skipped", torch.zeros((), dtype=torch.bool))
        self.on, self.version = False, self.skipped._version      # the buffer, as it was read
        self.rest: int | None = None                 # what it answers besides; -1: no tuple

    def skip(self, on: bool) -> None:
        """Leave the block out, or not."""
        self.skipped.fill_(on)
        self.on, self.version = on, self.skipped._version

    def out(self) -> bool:
        """Is it left out? The buffer is read where somebody else has written it (a file)."""
        known = not is_fake(self.skipped)
        if known and self.version != self.skipped._version:
            self.on, self.version = bool(self.skipped), self.skipped._version
        return self.on

    def _apply(self, *args: Any, **kw: Any) -> Any:
        before = self.out()
        super()._apply(*args, **kw)
        self.on, self.version = before, self.skipped._version
        return self

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not self.out():
            return self._seen(module, call(*args, **kw))
        x = args[0] if args else next(iter(kw.values()))
        if self.rest is None:
            with replay(x.device, rng_state(x.device)):       # it draws nothing from the run
                out = self._seen(module, no_grad(module, call, *_uncached(args, kw)))
            if (out[0] if isinstance(out, tuple) else out).shape != x.shape:
                raise RecipeError(f"das: {type(module).__name__} answers another shape than it is "
                                  "given, so nothing can stand in its place")
        cache = named(module, args, kw).get("past_key_values")
        if cache is not None:
            number = next(m.layer_idx for m in module.modules() if hasattr(m, "layer_idx"))
            hole = x.new_zeros(len(x), 1, x.shape[1], 1)
            cache.update(hole, hole, number)
        y = x + self.f(x)
        return y if self.rest == -1 else (y, *[None] * (self.rest or 0))

    def _seen(self, module: nn.Module, out: Any) -> Any:
        more = out[1:] if isinstance(out, tuple) else ()
        if any(isinstance(t, Tensor) for t in more):
            raise RecipeError(f"das: {type(module).__name__} hands more than its state on, which "
                              "others wait for when it is skipped")
        self.rest = len(more) if isinstance(out, tuple) else -1
        return out
