"""Files of a model, in a folder here or in a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from ..formats.hub import local


def file_of(name: str, file: str) -> Path | None:
    """Where it lies, brought here from the hub if need be; None where the model has no such file.

    Raises ConfigError or BurnishError where that cannot be told.
    """
    found = Path(local(name)).expanduser() / file
    return found if found.is_file() else None
