"""What the page may name: files below the root, what was uploaded, names on the hub.

    root:models/vit        below the folder that the server was started with
    upload:ID/mails.csv    what a browser brought, in the folder of runs
    hub:google/vit         a name on the hub, never a path
    builtin:digits

A place is resolved to the end, links included, before anything is opened; what comes out elsewhere
is refused, and so is a folder that holds a link to elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError, DataError

#: most entries of a folder that are listed, and that are looked through for links
LISTED, LOOKED_THROUGH = 2000, 2_000_000
#: what a run, an upload and a file of one may be called
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
NAME = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|.][^\x00-\x1f\x7f/\\:*?\"<>|]{0,119}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(:[\w.-]{1,60})?")
#: files of which a folder with one is a model: of transformers, or a pipeline of diffusers
MODELS = ("config.json", "model_index.json")
#: a repository on the hub has no such ending, a file has
_FILE = re.compile(r"\.(csv|tsv|jsonl?|parquet|txt|md|rst|py|conll|safetensors)\Z", re.I)


class Refused(BurnishError):
    """Asked for what is not to be had here."""


class Missing(BurnishError):
    """There is nothing of that name."""


@dataclass(frozen=True)
class Places:
    """root: what may be browsed. runs: the folder of runs and uploads."""

    root: Path
    runs: Path

    @classmethod
    def of(cls, root: Path, runs: Path) -> Places:
        return cls(Path(os.path.realpath(root)), Path(os.path.realpath(runs)))

    def below_root(self, path: str) -> Path:
        """The real path of what is called `path` below the root."""
        return inside(self.root, path)

    def run(self, name: str) -> Path:
        """The folder of a run or an upload."""
        if not ID.fullmatch(name):
            raise Missing("no such run")
        return self.runs / name

    def named(self, place: Any) -> str:
        """The path or name that a place stands for."""
        if not isinstance(place, str) or len(place) > 4096:
            raise ConfigError("a place is text such as 'root:data/mails.csv' or 'hub:owner/name'")
        kind, _, name = place.partition(":")
        if kind == "root":
            return str(checked(self.below_root(name), self))
        if kind == "upload":
            upload, _, path = name.partition("/")
            return str(checked(inside(self.run(upload) / "data", path), self))
        if kind == "hub":
            if not _HUB.fullmatch(name) or ".." in name or _FILE.search(name):
                raise ConfigError(f"{name!r} is no name on the hub; those are written owner/name")
            return name
        if place == "builtin:digits":
            return "digits"
        raise ConfigError(f"{place!r} names no place; expected root:, upload:, hub: or "
                          "builtin:digits")

    def browse(self, path: str) -> dict[str, Any]:
        """What lies in a folder below the root: folders first, models marked."""
        folder = self.below_root(path)
        if not folder.is_dir():
            raise ConfigError(f"{path or 'the root'} is no folder")
        shown = "" if folder == self.root else folder.relative_to(self.root).as_posix()
        found = []
        for name, kind, size in _entries(folder, self.root):
            found.append({"name": name, "kind": kind, "size": size,
                          "path": f"{shown}/{name}" if shown else name})
        found.sort(key=lambda e: (e["kind"] == "file", e["name"].lower()))
        return {"root": self.root.name or str(self.root), "path": shown,
                "model": any((folder / n).is_file() for n in MODELS), "entries": found[:LISTED],
                "more": max(0, len(found) - LISTED)}


def _entries(folder: Path, root: Path) -> Iterator[tuple[str, str, int]]:
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                if e.name.startswith("."):
                    continue
                if e.is_symlink() and not _is_inside(Path(os.path.realpath(e.path)), root):
                    continue
                if e.is_dir():
                    model = any(os.path.isfile(os.path.join(e.path, n)) for n in MODELS)
                    yield e.name, "model" if model else "folder", 0
                elif e.is_file():
                    yield e.name, "file", e.stat().st_size
    except OSError as e:
        raise ConfigError(f"{folder.name}: {e.strerror or e}") from None


def inside(top: Path, path: str) -> Path:
    """The real path of ``top/path``; Refused where that is not below `top`, or `top` itself."""
    if "\0" in path or "\\" in path or path.startswith(("/", "~")) or ":" in path.split("/")[0]:
        raise Refused("only what lies below the folder that was opened can be read")
    real, start = Path(os.path.realpath(top / path)), Path(os.path.realpath(top))
    if not _is_inside(real, start):
        raise Refused("only what lies below the folder that was opened can be read")
    if not real.exists():
        raise Missing(f"there is nothing at {path}")
    return real


def checked(path: Path, places: Places) -> Path:
    """`path`, with no link in it that leads out of root and runs, and nothing but files and
    folders."""
    seen = 0
    waiting = [path] if path.is_dir() else []
    if not waiting and not path.is_file():
        raise Refused(f"{path.name} is neither a file nor a folder")
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for e in entries:
                seen += 1
                if seen > LOOKED_THROUGH:
                    raise ConfigError(f"{path.name} holds more than {LOOKED_THROUGH:,} files")
                if e.is_symlink():
                    real = Path(os.path.realpath(e.path))
                    if not any(_is_inside(real, top) for top in (places.root, places.runs)):
                        raise Refused(f"{path.name} holds {e.name}, a link to outside of the "
                                      "folder that was opened")
                if e.is_dir(follow_symlinks=False):
                    waiting.append(Path(e.path))
                elif not e.is_symlink() and not e.is_file(follow_symlinks=False):
                    raise Refused(f"{path.name} holds {e.name}, which is no file")
    return path


def confine(data: str, tops: Sequence[str], named: Iterable[str] = ()) -> None:
    """Raises Refused where a table points at files outside of what may be read: by the columns that
    are read as files, and by those that somebody names."""
    from ..fit.columns import AUDIO, IMAGE, MASK
    from ..fit.layouts import TABLES

    path = Path(data)
    if not path.is_absolute():                      # a name on the hub, or built in
        return
    files = {"file_name", "file", "path", *IMAGE, *AUDIO, *MASK, *(n.lower() for n in named)}
    for one in [path] if path.is_file() else sorted(path.rglob("*")):
        if one.suffix.lower() not in TABLES:
            continue
        for name, values in _columns(one).items():
            if name.lower() in files or name.lower().endswith("_file_name"):
                for file in (f for value in values for f in _files(value)):
                    if not _below(one.parent, file, tops):
                        raise Refused(f"{one.name}, column {name!r}: {file[:80]!r} lies outside "
                                      "of the folder that was opened")


def _columns(file: Path) -> Mapping[str, Sequence[Any]]:
    """The columns of a table; of a JSON document that is none (COCO's) what stands under each name,
    however deep."""
    from ..core.reading import parse_json, read_text
    from ..fit.layouts import table

    try:
        return table(file).columns
    except DataError:
        if file.suffix.lower() != ".json":
            raise
    found: dict[str, list[Any]] = {}
    waiting = [parse_json(read_text(file, DataError), file, DataError)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for name, value in one.items():
                found.setdefault(name, []).append(value)
            one = list(one.values())
        if isinstance(one, list):
            waiting += one
    return found


def _files(value: Any) -> list[str]:
    """The paths that a cell of a table may name."""
    if isinstance(value, dict):
        coded = value.get("bytes")
        given = [] if isinstance(coded, bytes) else [coded, value.get("path")]
    else:
        given = [value]
    return [v for v in given if isinstance(v, str)]


def _below(folder: Path, file: str, tops: Sequence[str]) -> bool:
    """Is it, whether readers take it from the table's folder or from where they stand?"""
    if ".." in Path(file).parts or file.startswith("~") or "\0" in file:
        return False
    real = Path(os.path.realpath(folder / file))
    return any(_is_inside(real, Path(top)) for top in tops)


def _is_inside(path: Path, top: Path) -> bool:
    return path == top or top in path.parents
