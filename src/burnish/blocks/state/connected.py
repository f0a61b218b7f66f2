"""A path beside the blocks of a stack on which gradients meet no frozen weight.

    s_l = s_(l-1) + B_l(h_l + s_(l-1)),   s_0 = 0,   h_l <- h_l + s_l

Letters: h_l what block l answers (..., D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...core.errors import RecipeError
from .prompts import Listener


class Aside(Listener):
    """Listens to one block: its step of the path, with B of any kind (D wide on both sides).

    first, last: where in the stack. apart: B reads h without a gradient, and the path joins the
    stream behind the last block alone.
    """

    what = "an aside pathway"

    def __init__(self, state: Any, adapter: str, module: nn.Module, *, first: bool, last: bool,
                 apart: bool):
        super().__init__(state, adapter)
        self.f = module
        self.first, self.last, self.apart = first, last, apart

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box, key = self.here.box, ("aside", self.adapter)
        s = box.pop(key, None)
        if s is None and not self.first:
            raise RecipeError(f"{type(module).__name__} runs without the block before it, whose "
                              "step of the aside pathway it goes on from; drop the checkpointing")
        out = call(*args, **kw)
        h = out[0] if isinstance(out, tuple) else out
        read = h.detach() if self.apart else h
        s = self.f(read) if self.first else s + self.f(read + s)
        if not self.last:
            box[key] = s
        if self.apart and not self.last:
            return out
        return (h + s, *out[1:]) if isinstance(out, tuple) else h + s
