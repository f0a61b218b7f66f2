"""Small files of a run, read and written whole, without the libraries that models need."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError
from ..core.reading import parse_json, read_text


def write_json(path: Path, data: Mapping[str, Any], new: bool = False) -> None:
    """In one piece or not at all; `new`: where nothing stands yet (else FileExistsError).
    Raises BurnishError where the disk does not take it."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        if not new:
            os.replace(part, path)
            return
        os.link(part, path)                          # of two at once one finds it there
        part.unlink()
    except FileExistsError:
        part.unlink(missing_ok=True)
        raise
    except OSError as e:
        part.unlink(missing_ok=True)
        raise BurnishError(f"cannot write {path}: {e.strerror or e}") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object; an empty one where the file is not there, or holds no object."""
    try:
        found = os.stat(path)
    except OSError:
        return {}
    return dict(_kept(path, found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=256)
def _kept(path: Path, *moment: int) -> dict[str, Any]:
    try:
        found = parse_json(read_text(path), path)
    except BurnishError:
        return {}
    return _finite(found) if isinstance(found, dict) else {}


def _finite(found: Any) -> Any:
    """Without NaN and infinities, for which JSON in a browser has no word."""
    if isinstance(found, dict):
        return {k: _finite(v) for k, v in found.items()}
    if isinstance(found, list):
        return [_finite(v) for v in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
