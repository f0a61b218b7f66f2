"""The timeline, drawn once. Everybody who writes a handler designs against this picture.

    start(total)
      +-- step_begin(step)
      |     around_step(pass)        a generator; where it yields, for each micro-batch:
      |       forward -> loss -> backward
      |     before_update(step)      gradients complete, weights old
      |     update                   the optimizer's step
      |       tensor_updated(p, grad)  for each tensor: p new, its gradient still there
      |     after_update(step)       all weights new
      +-- step_end(step)
    finish

`around_step` is for what needs further passes (engine/around.py): it may probe, and change what the
pass will meet. A loop that makes its own passes calls ``tuned.backward`` for it; an update whose
passes nobody surrounded is refused.

`rehearse(step)` is sent by simulation and measurement alone, before each of their steps: a handler
whose heavy steps are rare makes this the heaviest there is, so that the promise covers them.

`tensor_updated` is for what reads gradients (scores): it comes tensor by tensor, also where a step
inside backward frees each gradient at once. An optimizer that makes no gradients does not send it,
and a recipe whose parts need it is refused (`words.py`).

A handler is any object; its methods named like the events are called. Phases order handlers of
one event (`phase`, default 50, small first; `EARLY`, `LATE`), then the order written in the
recipe. Everything hangs on the optimizer, so a recipe does the same in anybody's loop: `step_begin`
fires when the previous update is done (and before the first forward), the rest around
`optimizer.step()`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

EVENTS = ("start", "step_begin", "around_step", "rehearse", "before_update", "tensor_updated",
          "after_update", "step_end", "finish")

#: phases: before all who name none, for what others must find decided; and after (or inside) them
EARLY, LATE = 10, 80


class Timeline:
    """Calls handlers in order and keeps a short trace of what ran."""

    def __init__(self, handlers: list[tuple[str, Any]]):
        self.handlers = handlers                     # (name of the part, handler)
        self.step = 0
        self.started = False
        self.trace: deque[tuple[str, str, int]] = deque(maxlen=256)

    def emit(self, event: str, *args: Any) -> None:
        for name, handler in self._sorted(event):
            self.trace.append((event, name, self.step))
            getattr(handler, event)(*args)

    def _sorted(self, event: str) -> list[tuple[str, Any]]:
        ready = [(name, h) for name, h in self.handlers if hasattr(h, event)]
        return sorted(ready, key=lambda nh: getattr(nh[1], "phase", 50))

    def around(self) -> list[Any]:
        """Who stands around a pass, outermost first."""
        return [h for _, h in self._sorted("around_step")]

    def listens(self, event: str) -> bool:
        """Does any handler want this event?"""
        return any(hasattr(h, event) for _, h in self.handlers)

    def tensor_updated(self, p: Any, grad: Any) -> None:
        """One tensor is new; too frequent for the trace."""
        for _, handler in self.handlers:
            if hasattr(handler, "tensor_updated"):
                handler.tensor_updated(p, grad)

    def start(self, total: int | None) -> None:
        """Once, before the first forward; `total` updates are planned, None if unknown."""
        if not self.started:
            self.started = True
            self.emit("start", total)
            self.emit("step_begin", self.step)

    def before_update(self) -> None:
        self.emit("before_update", self.step)

    def after_update(self) -> None:
        self.emit("after_update", self.step)
        self.emit("step_end", self.step)
        self.step += 1
        self.emit("step_begin", self.step)

    def told(self) -> dict[str, Any]:
        """What handlers have to say of a run, by name of their part: plain values, for run.json."""
        return {n: dict(h.told()) for n, h in self.handlers if hasattr(h, "told")}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and each handler's own state."""
        return {"step": self.step,
                "handlers": {n: h.state_dict() for n, h in self.handlers
                             if hasattr(h, "state_dict")}}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.started = state["step"], True
        for name, handler in self.handlers:
            if name in state["handlers"]:
                handler.load_state_dict(state["handlers"][name])
