"""Bytes for people: ``8GB`` is 8e9, ``8GiB`` is 8 * 2**30, ``8G`` is what tools print (GiB)."""

from __future__ import annotations

import re

from ..core.errors import ConfigError

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
           "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS = {**_DECIMAL, **_BINARY}


def parse_bytes(text: str | int | float) -> int:
    """A number of bytes from ``"8GB"``, ``"8 GiB"``, ``"900MB"``, ``"1.5g"`` or a plain number.

    kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters powers of 1024.
    Raises ConfigError for anything else, and for a budget that is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ConfigError(f"a memory size is text such as '8GB', not {type(text).__name__}")
    match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*",
                         str(text).lower().replace(",", ""))
    unit = match.group(2) or "b" if match else ""
    if match is None or unit not in _UNITS:
        raise ConfigError(f"{text!r} is not a memory size; write for example '8GB', '7.5 GiB' "
                          f"or '900MB'")
    size = int(float(match.group(1).replace("_", "")) * _UNITS[unit])
    if size <= 0:
        raise ConfigError(f"a memory budget of {text!r} is not positive; write for example '8GB'")
    return size


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
