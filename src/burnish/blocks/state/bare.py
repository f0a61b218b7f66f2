"""States that a model hands out between its blocks (``output_hidden_states``), without the rows
that prompts put among their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .prompts import Listener, without_rows


class Bare(Listener):
    """Listens to a module above a stack of blocks: of the states between the blocks, T tokens as
    they enter the first, those that have `length` more, or more than that where others have put in
    theirs, lose so many behind the first `after` (None: the last ones). Attention weights keep
    them: over fewer tokens they would not sum to 1.
    """

    changes = False

    def __init__(self, state: Any, adapter: str, length: int, after: int | None):
        super().__init__(state, adapter)
        self.length, self.after = length, after

    def check(self, call: Any) -> None:
        pass                                     # the blocks' own listeners say it

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if isinstance(out, tuple):               # return_dict=False
            return type(out)(*map(self.bare, out)) if hasattr(out, "_fields") else \
                tuple(map(self.bare, out))
        if not isinstance(out, Tensor) and hasattr(out, "get") \
                and isinstance(states := out.get("hidden_states"), tuple):
            out["hidden_states"] = self.bare(states, out.get("last_hidden_state"))
        return out

    def bare(self, states: Any, last: Tensor | None = None) -> Any:
        """The states at their own length; what is no tuple of such is handed on."""
        if not isinstance(states, tuple) or not all(
                h is None or isinstance(h, Tensor) and h.dim() == 3 for h in states):
            return states
        T = next((h.shape[1] for h in (states[:1] if last is None else (*states[:1], last))
                  if h is not None), None)
        return tuple(h if h is None or T is None or h.shape[1] < T + self.length else
                     without_rows(h, self.length, self.after) for h in states)
