"""How much evaluation may keep of what it makes (blocks/weight/folded.py), said in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..blocks.weight.folded import Room
from ..core.errors import ConfigError


@contextmanager
def allowing(room: Room, limit: int | str) -> Iterator[None]:
    """Inside, so many bytes may be kept; before and after, none are."""
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
