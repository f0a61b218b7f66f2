"""How much evaluation may keep of what it makes (blocks/weight/folded.py), said in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import ConfigError
from .state import State


class Evaluating:
    """The part of :class:`~burnish.engine.tuned.Tuned` that says how much evaluation may keep."""

    state: State

    def _ready(self) -> None:
        raise NotImplementedError

    @contextmanager
    def cached(self, limit: int | str) -> Iterator[None]:
        """Inside, evaluation (``eval()`` and no gradients) may keep so many bytes of what it makes
        of weights and updates: ``with tuned.cached("4GB"): model.generate(...)``. Outside it is
        64 MiB. Keeping all of it takes the bytes of the weights that an update without a cheap
        path on tokens (snell, shira, bone), a convolution or attention's projection touches.

        Answers have the same bits with and without. It holds for all threads. Raises ConfigError
        for what is no size.
        """
        self._ready()
        room = self.state.room
        was, room.limit = room.limit, size(limit)
        room.clear()
        try:
            yield
        finally:
            room.limit = was
            room.clear()


def size(limit: int | str) -> int:
    """Bytes, from a number of them (0: none) or from text. Raises ConfigError."""
    from ..memory.units import parse_bytes

    if isinstance(limit, bool) or not isinstance(limit, (int, str)) or \
            isinstance(limit, int) and limit < 0:
        raise ConfigError(f"a limit of memory is bytes or text such as '4GB', got {limit!r}")
    return 0 if limit in (0, "0") else parse_bytes(limit)
