"""Checkpoint folders that are whole or not there.

    out/checkpoint-120/
        adapter_config.json, adapter_model.safetensors, ...   what was trained so far
        optimizer.json, optimizer.safetensors                 state by parameter name
        loop.json                                             scheduler, timeline, position
        rng-0.json, rng-0.safetensors                         generators, one per process
        buffers.safetensors                                   the model's own buffers, if any
        trainer_state.json                                    step, history, best so far
        complete.json                                         name and size of every file above
        owed.json                                             until this step was evaluated

A folder is written under a hidden name, flushed and renamed; removing one renames it back first.
A name like ``checkpoint-120`` therefore always means a whole checkpoint, at whatever moment a
process dies; ``complete.json`` guards against copies that lost files on the way. An evaluation at
the same step comes after the save, rewrites ``trainer_state.json`` and removes ``owed.json``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import BurnishError, FormatError
from ..formats import safe

PREFIX = "checkpoint-"
SEAL = "complete.json"
OWED = "owed.json"
#: rewritten in place (each time atomically) once the step was evaluated
CHANGES = ("trainer_state.json", OWED)
_NAME = re.compile(rf"^{PREFIX}(\d+)$")
_HIDDEN = re.compile(rf"^\.{PREFIX}\d+\.(?:writing|going)$")


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill; it takes the name `folder` when the block ends without an error.

    Raises BurnishError when the disk refuses; whatever was there before is untouched.
    """
    hidden = hidden_name(folder)
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        sizes = {str(p.relative_to(hidden)): p.stat().st_size
                 for p in sorted(hidden.rglob("*")) if p.is_file() and p.name not in CHANGES}
        safe.write_json(hidden / SEAL, {"files": sizes})
        if folder.exists():
            remove(folder)
        os.replace(hidden, folder)
        sync(folder.parent)
    except OSError as e:
        shutil.rmtree(hidden, ignore_errors=True)
        raise BurnishError(f"cannot write {folder}: {e.strerror or e}; the checkpoints before it "
                           "are untouched") from None
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def hidden_name(folder: Path) -> Path:
    """Where `folder` is written before it has its name."""
    return folder.with_name(f".{folder.name}.writing")


def owe(folder: Path) -> None:
    """Notes that this step is still to be evaluated."""
    safe.write_json(folder / OWED, {"evaluate": True})


def settle(folder: Path) -> None:
    (folder / OWED).unlink(missing_ok=True)


def is_owed(folder: Path) -> bool:
    return (folder / OWED).exists()


def remove(folder: Path) -> None:
    """Takes the name away first, so that half a checkpoint never carries it."""
    going = folder.with_name(f".{folder.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def step_of(folder: Path) -> int:
    found = _NAME.match(folder.name)
    if found is None:
        raise FormatError(f"{folder} is no checkpoint; expected {PREFIX}<step>")
    return int(found.group(1))


def all_in(output: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not output.is_dir():
        return []
    found = [p for p in output.iterdir() if _NAME.match(p.name) and whole(p)]
    return sorted(found, key=step_of)


def whole(folder: Path) -> bool:
    """Has every file its seal names, in full size."""
    try:
        files = safe.read_json(folder / SEAL)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, FormatError, KeyError, AttributeError):
        return False


def clear_leftovers(output: Path) -> list[str]:
    """Removes what an interrupted process left half written; returns its names.

    A folder that was whole and only waited for its name gets it.
    """
    if not output.is_dir():
        return []
    for p in list(output.iterdir()):
        if p.name.endswith(".writing") and _HIDDEN.match(p.name) and whole(p):
            named = p.with_name(p.name[1:].removesuffix(".writing"))
            if not named.exists():
                os.replace(p, named)
    left = [p for p in output.iterdir()
            if _HIDDEN.match(p.name) or (_NAME.match(p.name) and not whole(p))]
    for p in left:
        shutil.rmtree(p, ignore_errors=True)
    return sorted(p.name for p in left)


def rotate(output: Path, keep: int | None, protected: Path | None = None) -> None:
    """Removes the oldest beyond `keep`, never the newest and never `protected`."""
    if not keep or keep < 1:
        return
    found = all_in(output)
    best = protected.name if protected is not None else None
    spare = [p for p in found[:-1] if p.name != best]
    for p in spare[: max(0, len(found) - max(keep, 1 + (best is not None)))]:
        remove(p)


def find(output: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to go on from: a path, or (True, "auto") the newest whole one, or None.

    Raises FormatError for a named checkpoint that is missing or not whole.
    """
    if resume in (False, None):
        return None
    if resume in (True, "auto"):
        found = all_in(output)
        return found[-1] if found else None
    folder = Path(resume)
    step_of(folder)
    if not whole(folder):
        raise FormatError(f"{folder} is not a whole checkpoint"
                          + ("" if folder.is_dir() else ": there is no such folder"))
    return folder


def sync(folder: Path) -> None:
    """The rename itself reaches the disk, where folders can be flushed."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
