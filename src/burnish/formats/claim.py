"""Which files of a folder are ours, and who may write there now.

    .burnish.json            our mark: what kind of folder this is, and the names we wrote in it
    ../.<folder>.burnish-lock   held while a process writes there: its number and its machine

burnish changes and removes only what the mark names. Small files (a model card, a
configuration) are marked with their SHA-256: one that was edited by hand is no longer ours.
An output that is, or lies inside, something that is read is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError
from ..core.reading import LARGEST, parse_json, read_text
from . import safe

MARK = ".burnish.json"
#: where files of a folder wait until all of them are whole (see staged.py)
STAGE = ".burnish.new"
#: files up to this size are marked with their content
SMALL = 1 << 20
#: what each kind of folder is called in an error
KINDS = {"adapter": "an adapter or the run that made it", "model": "a merged model",
         "peft": "a PEFT adapter", "mlx": "an adapter for MLX",
         "diffusers": "a LoRA for diffusers",
         "demo": "a demo", "checkpoint": "a checkpoint"}

Inputs = Iterable[tuple[str, Any]]


# -- the mark -------------------------------------------------------------------------------
@dataclass
class Mark:
    """wrote: name -> the digests it may have ([] for a file that grows or is large).

    pending, dropped: names that a write which was interrupted still has to move in, or remove.
    """

    kind: str = ""
    wrote: dict[str, list[str]] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Mark:
        """The mark of a folder; an empty one where there is none, or one that cannot be read."""
        try:
            data = parse_json(read_text(folder / MARK, largest=LARGEST), folder / MARK)
            if data["library"] != "burnish":
                return cls()
            names = [data["pending"], data["dropped"]]
            wrote = {str(n): [str(d) for d in v] for n, v in data["wrote"].items()}
            return cls(str(data["kind"]), wrote, *[[str(n) for n in v] for v in names])
        except (BurnishError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, folder: Path) -> None:
        safe.write_json(folder / MARK, {
            "library": "burnish", "kind": self.kind, "wrote": self.wrote,
            "pending": self.pending, "dropped": self.dropped})

    def owns(self, folder: Path, name: str) -> bool:
        """Did we write this file, and is it still as we wrote it?"""
        if name not in self.wrote:
            return False
        digests, path = self.wrote[name], folder / name
        if not os.path.lexists(path):
            return True
        return path.is_dir() if not path.is_file() else not digests or digest(path) in digests


def digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def digests(path: Path) -> list[str]:
    return [digest(path)] if path.is_file() and path.stat().st_size <= SMALL else []


def own(folder: Path, names: Iterable[str], kind: str) -> None:
    """Marks names of files that are about to be written, and grow."""
    mark = Mark.of(folder)
    mark.kind = mark.kind or kind
    mark.wrote |= {n: [] for n in names}
    mark.write(folder)


def marking(path: Path) -> bool:
    """A mark that was being written when its process was killed."""
    return path.name.startswith(f".{MARK}.") and safe.is_temporary(path)


def marked(folder: Path) -> bool:
    return bool(Mark.of(folder).kind)


def others(folder: Path) -> list[str]:
    """Names in a folder that are not ours."""
    mark = Mark.of(folder)
    return sorted(p.name for p in folder.iterdir()
                  if p.name not in (MARK, STAGE, _INSIDE) and not mark.owns(folder, p.name))


def refuse_foreign(folder: Path, names: Iterable[str], kind: str) -> None:
    """Raises ConfigError when one of `names` (patterns) is there and is not ours, or when the
    folder holds something of another kind."""
    if not folder.is_dir():
        return
    mark = Mark.of(folder)
    if mark.kind and mark.kind != kind:
        raise ConfigError(f"{folder} holds {KINDS.get(mark.kind, mark.kind)}; "
                          "name another folder for the output")
    patterns = list(names)
    for p in sorted(folder.iterdir()):
        if any(fnmatch.fnmatchcase(p.name.lower(), n.lower()) for n in patterns) \
                and not mark.owns(folder, p.name):
            why = "was changed since burnish wrote it" if p.name in mark.wrote else \
                "was not written by burnish"
            raise ConfigError(f"{p} {why}, and would be replaced; move it away, or name another "
                              "folder for the output")


def moment(folder: Path) -> tuple[int, int]:
    """Differs before and after our files in a folder changed."""
    try:
        found = os.stat(folder / MARK)
        return found.st_ino, found.st_mtime_ns
    except OSError:
        return 0, 0


# -- inputs ---------------------------------------------------------------------------------
def refuse_overlap(output: str | Path, inputs: Inputs, whole: bool = False) -> None:
    """Raises ConfigError when the output is an input, or lies inside one.

    inputs: (what it is, path or name); names that are no path here are left out.
    whole: the output is replaced as a whole, so nothing that is read may lie inside it either.
    """
    out = _real(output)
    for what, given in inputs:
        if not isinstance(given, str | os.PathLike) or not str(given) or "\0" in str(given):
            continue
        path = Path(given).expanduser()
        try:
            if not os.path.lexists(path):
                continue
        except (OSError, ValueError):
            continue
        source = _real(path)
        if source == out or _same(source, out):
            raise ConfigError(f"the output {output} is {what} itself; name another folder")
        if _inside(out, source):
            raise ConfigError(f"the output {output} lies inside {what} ({given}); name a folder "
                              "outside it")
        if _inside(source, out):
            name = source.relative_to(out).parts[0]
            if whole or name in Mark.of(out).wrote or marked(out / name):
                raise ConfigError(f"{what} ({given}) lies inside the output {output}, which "
                                  "would be replaced; name another folder")


def refuse_file(output: str | Path, inputs: Inputs) -> None:
    """For an output that is one file: ConfigError where it is an input, BurnishError where it
    cannot be written. Before work that ends in it."""
    out = _real(output)
    for what, given in inputs:
        if isinstance(given, str | os.PathLike) and "\0" not in str(given) and (
                _real(given) == out or _same(_real(given), out)):
            raise ConfigError(f"{output} is {what} itself, which would be replaced; name another "
                              "file")
    safe.check_writable(output)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(Path(path).expanduser()))


def _same(a: Path, b: Path) -> bool:
    """One place under two names: hard links, bind mounts, and names that differ in case."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _inside(a: Path, b: Path) -> bool:
    return a != b and (b in a.parents or any(_same(p, b) for p in a.parents if b.is_dir()))


# -- one writer at a time -------------------------------------------------------------------
_INSIDE = ".burnish-lock"
_held: dict[tuple[int, str], tuple[int, int]] = {}      # (process, place) -> (thread, depth)
_guard = threading.Lock()


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds a folder for writing; again by the same thread is no matter.

    The system lets go of the lock when a process dies, at whatever moment. Raises ConfigError
    when somebody else holds it, BurnishError where the place cannot be written.
    """
    place = _real(folder)
    key = (os.getpid(), str(place))
    me = threading.get_ident()
    with _guard:
        thread, depth = _held.get(key, (me, 0))
        if thread != me:
            raise ConfigError(f"another thread of this process is writing to {folder}; wait for "
                              "it, or name another folder")
        _held[key] = (me, depth + 1)
    try:
        if depth:
            yield
        else:
            with _file_lock(place, Path(folder)):
                yield
    finally:
        with _guard:
            thread, depth = _held[key]
            if depth > 1:
                _held[key] = (thread, depth - 1)
            else:
                del _held[key]


@contextlib.contextmanager
def _file_lock(place: Path, shown: Path) -> Iterator[None]:
    path = _lock_path(place, shown)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise BurnishError(f"cannot write {shown}: {e.strerror or e}") from None
        try:
            if not _taken(handle):
                raise ConfigError(_busy(handle, shown, path))
            if not _still_there(handle, path):       # its holder removed it meanwhile
                os.close(handle)
                continue
            _elsewhere(handle, shown, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        break
    try:
        text = json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode()
        with contextlib.suppress(OSError):           # a full disk: the lock holds without it
            os.ftruncate(handle, 0)
            os.pwrite(handle, text, 0) if hasattr(os, "pwrite") else os.write(handle, text)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _lock_path(place: Path, shown: Path) -> Path:
    """Beside the folder, so that the folder can be replaced; inside where that is not allowed."""
    parent = place.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BurnishError(f"cannot write {shown}: {e.strerror or e}") from None
    name = place.name if len(place.name.encode()) < 200 else \
        hashlib.sha256(place.name.encode()).hexdigest()
    if place.is_dir() and (place == parent or not os.access(parent, os.W_OK | os.X_OK)):
        return place / _INSIDE
    return parent / f".{name}.burnish-lock"


try:
    import fcntl

    def _taken(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
except ImportError:                                  # Windows
    import msvcrt

    def _taken(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        except OSError:
            return False


def _still_there(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == os.stat(path).st_ino
    except OSError:
        return False


def _holder(handle: int) -> Mapping[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096) or b"{}")
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _busy(handle: int, shown: Path, path: Path) -> str:
    found = _holder(handle)
    who = f"process {found['process']} on {found['machine']}" \
        if {"process", "machine"} <= set(found) else "another process"
    return f"{who} is writing to {shown}; wait for it, or name another folder"


def _elsewhere(handle: int, shown: Path, path: Path) -> None:
    """A lock that was never let go of: here its holder is dead, of another machine none can say."""
    found = _holder(handle)
    machine = found.get("machine")
    if machine and machine != socket.gethostname():
        raise ConfigError(f"process {found.get('process')} on {machine} is, or was, writing to "
                          f"{shown}; if it is dead, remove {path}")
