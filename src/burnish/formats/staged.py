"""Several files that change together: either all of the new ones stand, or all of the old.

``update`` changes named files in a folder that may hold others. The new files wait in a hidden
folder inside until all are whole and flushed; then the mark lists them (that is the moment of the
change) and they are renamed into place. Whoever reads or writes the folder next ends what a killed
process left listed. ``replace`` makes a folder that is ours altogether: it is built beside and
takes the name in one step, so that every other library too sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..core.errors import BurnishError, ConfigError, FormatError
from . import claim, safe
from .claim import KINDS, MARK, STAGE, Inputs, Mark

_open: set[Path] = set()
T = TypeVar("T")


def waiting(folder: Path) -> bool:
    """Is this a folder that waits to be moved into place?"""
    return Path(folder) in _open


@contextlib.contextmanager
def joining(stage: Path) -> Iterator[Path]:
    """Updates of `stage` are part of something larger: no mark, no lock, no moves of their own."""
    _open.add(stage)
    try:
        with _quiet():
            yield stage
    finally:
        _open.discard(stage)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar for every model that it writes, also where nobody watches."""
    library: Any = sys.modules.get("transformers")
    if library is None or not library.utils.logging.is_progress_bar_enabled():
        yield
        return
    library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        library.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def update(folder: str | Path, kind: str, names: Iterable[str] = (), drop: Iterable[str] = (),
           inputs: Inputs = ()) -> Iterator[Path]:
    """A folder to write files into; they move to `folder` together when the block ends.

    Inside another update of the same folder the files join it.

    names: patterns of what will be written, so that a file that is not ours is refused before the
        block runs.  drop: names of ours to remove.  inputs: see :func:`claim.refuse_overlap`.
    Raises ConfigError (foreign files, overlaps, another writer), BurnishError where the disk
    refuses; the old files are then untouched.
    """
    folder = Path(folder)
    if waiting(folder):
        yield folder
        return
    drop = list(drop)
    claim.refuse_overlap(folder, inputs)
    with _saying(folder):
        claim.refuse_foreign(folder, [*names, *drop], kind)
    with claim.lock(folder), _saying(folder):
        there = folder.is_dir()
        finish(folder)
        stage = folder / STAGE
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        try:
            with joining(stage):
                yield stage
            _move(folder, stage, kind, drop)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if not there:
                with contextlib.suppress(OSError):
                    folder.rmdir()                   # nothing came of it


def _move(folder: Path, stage: Path, kind: str, drop: list[str]) -> None:
    new = sorted(p.name for p in stage.iterdir())
    claim.refuse_foreign(folder, new, kind)          # whatever appeared meanwhile
    _flush(stage)
    mark = Mark.of(folder)
    mark.kind = mark.kind or kind
    for name in new:                                 # until it is moved, the old one is ours too
        before, after = mark.wrote.get(name), claim.digests(stage / name)
        mark.wrote[name] = after if before is None else \
            [*before, *after] if before and after else []
    mark.pending, mark.dropped = new, [n for n in drop if n in mark.wrote and n not in new]
    mark.write(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Ends the moves that a mark lists. What is half written and not listed stays where it is."""
    mark = Mark.of(folder)
    if not mark.pending and not mark.dropped:
        return
    for name in mark.pending:
        source, goal = folder / STAGE / name, folder / name
        if not source.exists():                      # moved already
            continue
        if goal.is_dir() and not goal.is_symlink():
            shutil.rmtree(goal)
        os.replace(source, goal)
    for name in mark.dropped:
        (folder / name).unlink(missing_ok=True)
        mark.wrote.pop(name, None)
    for name in mark.pending:
        mark.wrote[name] = claim.digests(folder / name)
    mark.pending, mark.dropped = [], []
    safe.sync_folder(folder)
    mark.write(folder)
    shutil.rmtree(folder / STAGE, ignore_errors=True)


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder is to be read: in its place, or still waiting to be moved there."""
    mark = Mark.of(folder)
    staged = folder / STAGE / name
    if name in mark.pending and staged.exists():
        return staged
    return folder / name


def steady(folder: Path, read: Callable[[], T]) -> T:
    """What `read` finds in a folder; again, when files changed places as it read.

    A writer may stand still between its moves (a disk that flushes): it is waited for, two seconds.
    """
    for n in range(1000):
        before = claim.moment(folder)
        try:
            return read()
        except (FormatError, OSError) as e:
            pending = Mark.of(folder).pending        # asked first: the moment then tells of both
            moving = before != claim.moment(folder)
            if pending and not moving and n < 400:
                moving = True
                time.sleep(0.005)
            if not moving and isinstance(e, FormatError):
                raise
            if not moving:
                raise FormatError(f"cannot read {folder}: {safe.reason(e)}") from None
    raise FormatError(f"{folder} does not stand still: another process writes to it all the time")


@contextlib.contextmanager
def replace(folder: str | Path, kind: str, inputs: Inputs = ()) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends.

    Raises ConfigError when `folder` holds anything that is not ours or is of another kind, or
    when something that is read is, holds or lies in it; BurnishError where the disk refuses. The
    old folder is then untouched.
    """
    folder = Path(folder)
    goal = Path(os.path.realpath(folder))
    claim.refuse_overlap(folder, inputs, whole=True)
    with _saying(folder):
        refuse_others(folder, kind)
    with claim.lock(folder), _saying(folder):
        _restore(goal)
        beside = os.access(goal.parent, os.W_OK | os.X_OK)
        if not beside:                               # only the folder itself may be written
            with update(folder, kind, drop=Mark.of(folder).wrote) as stage:
                yield stage
            return
        hidden = goal.with_name(_hidden(goal, "new"))
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        try:
            with joining(hidden):
                yield hidden
            names = [p.name for p in hidden.iterdir() if p.name != MARK]
            Mark(kind, {n: claim.digests(hidden / n) for n in names}).write(hidden)
            _flush(hidden)
            if goal.exists():
                refuse_others(goal, kind)
                _swap(hidden, goal)
            else:
                os.replace(hidden, goal)
            safe.sync_folder(goal.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def refuse_others(folder: Path, kind: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the output")
    mark = Mark.of(folder)
    if mark.kind and mark.kind != kind:
        raise ConfigError(f"{folder} holds {KINDS.get(mark.kind, mark.kind)}; name another folder "
                          "for the output")
    if names := claim.others(folder):
        raise ConfigError(f"{folder} holds {names[0]}"
                          + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                          + " that burnish did not write so; name an empty or a new folder")


def _hidden(folder: Path, what: str) -> str:
    name = folder.name
    return f".{name[:200] if len(name.encode()) < 230 else 'folder'}.burnish-{what}"


def _swap(new: Path, old: Path) -> None:
    """`new` takes the name of `old`, and `old` that of `new`: in one step where there is one."""
    if _exchange(new, old):
        return
    going = old.with_name(_hidden(old, "old"))
    shutil.rmtree(going, ignore_errors=True)
    os.replace(old, going)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(going, old)
        raise
    shutil.rmtree(going, ignore_errors=True)


def _restore(folder: Path) -> None:
    """A process that died between the two renames of a swap left the old folder aside."""
    going = folder.with_name(_hidden(folder, "old"))
    if going.is_dir():
        if folder.exists():
            shutil.rmtree(going, ignore_errors=True)
        else:
            os.replace(going, folder)


def _exchange(a: Path, b: Path) -> bool:
    """Linux can swap two names at once (renameat2, RENAME_EXCHANGE)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100                                      # AT_FDCWD
    return call(here, os.fsencode(a), here, os.fsencode(b), 2) == 0


def _flush(folder: Path) -> None:
    """Everything below a folder reaches the disk."""
    for p in folder.rglob("*"):
        if p.is_file():
            with open(p, "rb") as f:
                os.fsync(f.fileno())
    safe.sync_folder(folder)


@contextlib.contextmanager
def _saying(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = safe.reason(e)
        raise BurnishError(f"cannot write {folder}: {reason}; what was there before is "
                           "untouched") from None
