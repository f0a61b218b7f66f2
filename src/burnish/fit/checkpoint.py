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

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError, FormatError
from ..formats import claim, safe, staged

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

    Raises BurnishError when the disk refuses, ConfigError when the name is taken by a folder that
    is not ours; whatever was there before is untouched.
    """
    hidden = hidden_name(folder)
    if folder.exists() and not ours(folder):
        raise ConfigError(foreign(folder))
    try:
        _delete(hidden)
        hidden.mkdir(parents=True)
        claim.own(hidden, (), "checkpoint")
        with staged.joining(hidden):
            yield hidden
        files = {str(p.relative_to(hidden)): p for p in sorted(hidden.rglob("*"))
                 if p.is_file() and p.name not in (OWED, claim.MARK)}
        safe.write_json(hidden / SEAL, {"files": {n: _line(p) for n, p in files.items()}})
        if folder.exists():
            remove(folder)
        os.replace(hidden, folder)
        safe.sync_folder(folder.parent)
    except OSError as e:
        _delete(hidden)
        raise BurnishError(f"cannot write {folder}: {e.strerror or e}; the checkpoints before it "
                           "are untouched") from None
    except BaseException:
        _delete(hidden)
        raise


def rewrite(folder: Path, name: str, text: str) -> None:
    """Another text for a sealed file: the seal allows both before the text changes, so a kill
    at any moment leaves a whole checkpoint."""
    seal = safe.read_json(folder / SEAL)
    data = text.encode()
    new = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    before = seal["files"].get(name, [])
    seal["files"][name] = [*(before if isinstance(before, list) else [before]), new]
    safe.write_json(folder / SEAL, seal)
    safe.write_text(folder / name, text)


def _line(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": claim.digest(path)}


def ours(folder: Path) -> bool:
    """Does the folder carry our mark?"""
    return claim.Mark.of(folder).kind == "checkpoint"


def foreign(folder: Path) -> str:
    return (f"{folder} was not written by burnish, and a run would take its name; move it away, "
            "or name another folder for the output")


def _delete(folder: Path) -> None:
    """A folder of ours, its mark last, so that what a kill leaves of it is still known as ours.
    One without a mark goes only when it is empty."""
    if not folder.is_dir():
        return
    if _empty(folder):
        for p in list(folder.iterdir()):
            p.unlink(missing_ok=True)
    if ours(folder):
        for p in list(folder.iterdir()):
            if p.name != claim.MARK:
                if p.is_dir() and not p.is_symlink():
                    shutil.rmtree(p, ignore_errors=True)
                else:
                    p.unlink(missing_ok=True)
        (folder / claim.MARK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


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
    if not ours(folder):
        raise ConfigError(foreign(folder))
    if added := _added(folder):
        raise ConfigError(f"{folder} holds {added}, which burnish did not write, so the "
                          "checkpoint is not removed; move it away")
    going = folder.with_name(f".{folder.name}.going")
    _delete(going)
    os.replace(folder, going)
    _delete(going)


def _added(folder: Path) -> str | None:
    """A file that somebody put into a checkpoint of ours."""
    known = {SEAL, *CHANGES, claim.MARK, *_sealed(folder)}
    return next((n for p in sorted(folder.rglob("*")) if p.is_file()
                 and (n := str(p.relative_to(folder))) not in known
                 and not safe.is_temporary(p)), None)


def _sealed(folder: Path) -> Mapping[str, Any]:
    try:
        files = safe.read_json(folder / SEAL)["files"]
        return files if isinstance(files, dict) else {}
    except (OSError, FormatError, KeyError):
        return {}


def step_of(folder: Path) -> int:
    found = _NAME.match(folder.name)
    if found is None:
        raise FormatError(f"{folder} is no checkpoint; expected {PREFIX}<step>")
    return int(found.group(1))


def named(output: Path) -> list[Path]:
    """Checkpoints of a run by name and mark, whole or not, oldest first."""
    if not output.is_dir():
        return []
    return sorted((p for p in output.iterdir() if _NAME.match(p.name) and p.is_dir() and ours(p)),
                  key=step_of)


def all_in(output: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [p for p in named(output) if whole(p)]


def whole(folder: Path) -> bool:
    """Is ours, and has every file its seal names, in full size."""
    files = _sealed(folder)
    return bool(files) and ours(folder) and all(
        _fits(folder / name, entry, False) for name, entry in files.items())


def changed(folder: Path) -> str | None:
    """The first sealed file that is not byte for byte what was written; None when all are."""
    return next((name for name, entry in _sealed(folder).items()
                 if not _fits(folder / name, entry, True)), None)


def _fits(path: Path, entry: Any, content: bool) -> bool:
    try:
        size = path.stat().st_size
        allowed = [e["sha256"] for e in (entry if isinstance(entry, list) else [entry])
                   if e["size"] == size]
        return bool(allowed) and (not content or claim.digest(path) in allowed)
    except (OSError, KeyError, TypeError, ValueError):
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
    left = [p for p in output.iterdir() if p.is_dir() and (ours(p) or _empty(p)) and (
        _HIDDEN.match(p.name) or (_NAME.match(p.name) and not whole(p) and not _added(p)))]
    for p in left:
        _delete(p)
    return sorted(p.name for p in left)


def refuse_foreign(output: Path) -> None:
    """Raises ConfigError for a folder that has a checkpoint's name and is not ours."""
    if output.is_dir():
        for p in sorted(output.iterdir()):
            if (_NAME.match(p.name) or _HIDDEN.match(p.name)) and not ours(p) and not _empty(p):
                raise ConfigError(foreign(p))


def _empty(folder: Path) -> bool:
    """Nothing in it, or no more than a mark that a kill cut off."""
    return folder.is_dir() and all(claim.marking(p) for p in folder.iterdir())


def rotate(output: Path, keep: int | None, protected: Path | None = None) -> None:
    """Removes the oldest beyond `keep`, never the newest and never `protected`."""
    if not keep or keep < 1:
        return
    found = all_in(output)
    best = protected.name if protected is not None else None
    spare = [p for p in found[:-1] if p.name != best and not _added(p)]
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
        if not found:
            return None
        folder = found[-1]
    else:
        folder = Path(resume)
        step_of(folder)
    if not whole(folder):
        raise FormatError(f"{folder} is not a whole checkpoint"
                          + ("" if folder.is_dir() else ": there is no such folder"))
    if bad := changed(folder):
        raise FormatError(f"{folder / bad} is not what was saved: its SHA-256 differs, so the "
                          "disk or a copy changed it; go on from an earlier checkpoint "
                          f"(resume='{folder.parent / PREFIX}<step>'), or remove this one")
    return folder
