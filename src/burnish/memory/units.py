"""Bytes for people: ``8GB`` is 8e9, ``8GiB`` is 8 * 2**30, ``8G`` is what tools print (GiB)."""

from __future__ import annotations

import re

from ..core.errors import ConfigError, nearest
from ..core.reading import shown

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
           "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS = {**_DECIMAL, **_BINARY}
#: commas and underscores between thousands; one alone is a decimal comma to half of the world
_SIZE = re.compile(r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)?(?:\.[0-9]+)?"
                   r"(?<=[0-9])(?:e[+-]?[0-9]+)?)\s*([a-z]*)")
_LONGEST, _MOST = 64, 2**63


def parse_bytes(text: str | int | float) -> int:
    """A number of bytes from ``"8GB"``, ``"8 GiB"``, ``"900MB"``, ``"1.5g"`` or a plain number.

    kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters powers of 1024.
    Thousands may be parted by commas (``"16,000MB"``); ``"7,5GB"`` could be 7.5 or 75: refused.
    Raises ConfigError for anything else, and for a budget that is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ConfigError(f"a memory size is text such as '8GB', not {type(text).__name__}")
    if isinstance(text, int):
        text = str(text) if abs(text) < _MOST else "1e99"     # Python writes no huge integers out
    said = shown(text, 60)
    word = str(text)[: _LONGEST + 1].strip().lower()
    match = _SIZE.fullmatch(word) if len(word) <= _LONGEST else None
    unit = match.group(2) or "b" if match else ""
    if match is None or unit not in _UNITS:
        near = nearest(unit, _UNITS) if unit else ""
        if re.fullmatch(r"[0-9]+,[0-9]+[a-z ]*", word):
            near = f"; a decimal is written with a point: {word.replace(',', '.')!r}"
        raise ConfigError(f"{said} is not a memory size; write for example '8GB', '7.5 GiB' "
                          f"or '900MB'{near}")
    size = float(match.group(1).replace("_", "").replace(",", "")) * _UNITS[unit]
    if not size < _MOST:
        raise ConfigError(f"a memory budget of {said} is more than any machine has; write for "
                          "example '8GB'")
    if size < 1:
        raise ConfigError(f"a memory budget of {said} is not positive; write for example '8GB'")
    return int(size)


def format_bytes(size: float) -> str:
    """``1.23 GiB``: three significant digits or so, in powers of 1024."""
    sign, size = ("-" if size < 0 else ""), abs(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{sign}{size:.0f} B"
    digits = 2 if size < 10 else 1 if size < 100 else 0
    return f"{sign}{size:,.{digits}f} {unit}"
