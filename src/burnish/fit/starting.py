"""Where a run begins: afresh, or at a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from . import checkpoint
from .arguments import Options


def starting_point(output: Path, own: Options, say: Any) -> Path | None:
    """The checkpoint to go on from, or None for the beginning, with the folder made fit for it."""
    for n in checkpoint.clear_leftovers(output):
        say(f"removed {n}, which an interrupted run left unfinished")
    start = checkpoint.find(output, own.resume)
    if start is not None:
        say(f"going on from {start}")
        return start
    if own.resume:
        say(f"no checkpoint in {output} to go on from: starting at the beginning")
    for folder in checkpoint.all_in(output):
        checkpoint.remove(folder)
    return None


def refuse_earlier(output: Path, own: Options) -> None:
    """Another run's checkpoints stay what they are, unless somebody says otherwise."""
    earlier = checkpoint.all_in(output)
    if earlier and not own.overwrite and checkpoint.find(output, own.resume) is None:
        raise ConfigError(f"{output} holds checkpoints of an earlier run; resume=True goes on from "
                          f"{earlier[-1].name}, overwrite=True removes them and starts afresh")
