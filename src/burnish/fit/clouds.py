"""How a file of points becomes the cloud that a model reads.

Read are ``.xyz`` (x y z on each line, more columns left out), ``.npy`` (points, 3 or more),
``.ply`` (ascii or binary: its vertices) and ``.off`` (a mesh). So many points are drawn of each: of
a mesh evenly over its surface, else of the points that stand there. They are moved to their mean
and scaled into the unit ball, as Point-MAE and PointNet are taught. Nothing that is read can run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.reading import decode, plain, reading, regular

CLOUDS = frozenset({".xyz", ".ply", ".npy", ".off"})

#: numbers of a .ply by their names, and bytes that its head has at most
_NUMBERS = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
            "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2",
            "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}
_HEAD = 1 << 16
_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass
class Cloud:
    """points: (P, 3).  faces: (F, 3) numbers of points, of a mesh; None of bare points."""

    points: np.ndarray
    faces: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return int(self.points.nbytes + (0 if self.faces is None else self.faces.nbytes))


def cloud(path: str | Path) -> Cloud:
    """What a file holds. Raises DataError with the line where it is broken."""
    path = regular(path, DataError)
    with reading(path, DataError):
        made = _READERS[path.suffix.lower()](path)
        if made.points.shape[0] == 0:
            raise DataError(f"{path} holds no points")
        if not np.isfinite(made.points).all():
            at = int(np.argmin(np.isfinite(made.points).all(1)))
            raise DataError(f"{path}: point {at + 1} is not finite")
        if not (made.points != made.points[0]).any():
            raise DataError(f"{path}: all {len(made.points)} points are one place, which has no "
                            "shape")
        return made


def looked(path: str) -> None:
    """Raises DataError where the head of a file is wrong or less of it is there than that says; the
    numbers themselves are read when they are asked for."""
    file = regular(path, DataError)
    kind = file.suffix.lower()
    with reading(file, DataError):
        if kind == ".npy":
            _array(file)
        elif kind == ".ply":
            _Ply(file).enough()
        elif kind == ".off":
            _Off(file)
        else:
            lines = _lines(file)
            if not lines:
                raise DataError(f"{file} holds no points")
            for n, line in (lines[0], lines[-1]):
                _numbers(line, file, n)


def sampled(made: Cloud, count: int, seed: Sequence[int], where: str = "the cloud") -> np.ndarray:
    """(count, 3) fp32: points drawn by `seed`, about their mean, within the unit ball.

    Of a mesh they lie on its surface, alike likely everywhere. Of points each is drawn once; where
    there are fewer than `count`, all of them and some again.
    """
    g = np.random.default_rng(list(seed))
    if made.faces is not None and len(made.faces):
        x = _surface(made.points, made.faces, count, g, where)
    else:
        many = len(made.points)
        order = g.permutation(many)[:count]
        again = g.integers(many, size=max(0, count - many))
        x = made.points[np.concatenate([order, again])]
    x = x - x.mean(0)
    most = float(np.sqrt((x * x).sum(1).max()))
    if not 0 < most < math.inf:
        raise DataError(f"{where}: the points that were drawn are one place, which has no shape")
    scaled: np.ndarray = (x / most).astype(np.float32)
    return scaled


def _surface(points: np.ndarray, faces: np.ndarray, count: int, g: np.random.Generator,
             where: str) -> np.ndarray:
    a, b, c = (points[faces[:, k]] for k in range(3))
    ends = np.cumsum(np.linalg.norm(np.cross(b - a, c - a), axis=1))     # twice their areas
    if not 0 < ends[-1] < math.inf:
        raise DataError(f"{where}: the faces of the mesh have no area")
    face = np.searchsorted(ends, g.random(count) * ends[-1], side="right").clip(max=len(ends) - 1)
    u, v = np.sqrt(g.random((count, 1))), g.random((count, 1))
    made: np.ndarray = (1 - u) * a[face] + u * (1 - v) * b[face] + u * v * c[face]
    return made


# -- text ----------------------------------------------------------------------------------------
def _lines(path: Path, data: bytes | None = None) -> list[tuple[int, str]]:
    """(number, text) of every line that says something."""
    text = decode(path.read_bytes() if data is None else data, path, DataError)
    told = ((n, line.partition("#")[0].strip()) for n, line in enumerate(text.split("\n"), 1))
    return [(n, line) for n, line in told if line]


def _numbers(line: str, path: Path, n: int, least: int = 3) -> list[float]:
    """The first three of a line. Raises DataError with the line."""
    fields = line.replace(",", " ").split()
    try:
        if len(fields) < least:
            raise ValueError
        return [float(f) for f in fields[:3]]
    except ValueError:
        raise DataError(f"{path}, line {n}: expected three numbers, found {plain(line, 60)!r}"
                        ) from None


def _rows(lines: list[tuple[int, str]], path: Path) -> np.ndarray:
    return np.array([_numbers(line, path, n) for n, line in lines], dtype=np.float64).reshape(-1, 3)


def _xyz(path: Path) -> Cloud:
    return Cloud(_rows(_lines(path), path))


class _Off:
    """The lines of an .off, of which there are as many as its head says."""

    def __init__(self, path: Path):
        lines = _lines(path)
        first = lines[0][1] if lines else ""
        word = next((w for w in ("COFF", "NOFF", "OFF") if first.startswith(w)), None)
        if word is None:
            raise DataError(f"{path} is no OFF: its first line is {plain(first, 40)!r}, not OFF")
        rest = first.removeprefix(word).strip()          # ModelNet has files without a break there
        head = (lines[0][0], rest) if rest else lines[1] if len(lines) > 1 else (1, "")
        self.lines = lines[1:] if rest else lines[2:]
        counts = head[1].split()
        if len(counts) < 2 or not all(c.isdigit() and len(c) < 10 for c in counts[:2]):
            raise DataError(f"{path}, line {head[0]}: expected numbers of points and faces, found "
                            f"{plain(head[1], 60)!r}")
        self.points, self.faces = int(counts[0]), int(counts[1])
        if len(self.lines) < self.points + self.faces:
            raise DataError(f"{path} breaks off: it says {self.points} points and {self.faces} "
                            f"faces, and has {len(self.lines)} lines of them")


def _off(path: Path) -> Cloud:
    found = _Off(path)
    points = _rows(found.lines[:found.points], path)
    faces: list[tuple[int, int, int]] = []
    for n, line in found.lines[found.points:found.points + found.faces]:
        fields = line.split()
        if not all(f.isdigit() and len(f) < 10 for f in fields[:1]) \
                or len(fields) < 1 + int(fields[0]):
            raise DataError(f"{path}, line {n}: expected a face, how many corners and which points,"
                            f" found {plain(line, 60)!r}")
        corners = fields[1:1 + int(fields[0])]
        if not all(f.isdigit() and len(f) < 10 and int(f) < found.points for f in corners):
            raise DataError(f"{path}, line {n}: a face names points from 0 to {found.points - 1}, "
                            f"found {plain(line, 60)!r}")
        at = [int(f) for f in corners]
        faces += [(at[0], at[k], at[k + 1]) for k in range(1, len(at) - 1)]
    return Cloud(points, np.array(faces, dtype=np.int64).reshape(-1, 3))


# -- numbers as they lie -------------------------------------------------------------------------
def _array(path: Path) -> np.ndarray:
    """(P, 3 or more), not yet read. What is pickled is refused, and a file shorter than its head
    says."""
    try:
        made = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:
        raise DataError(f"{path} cannot be read as .npy: {plain(e, 160)}") from None
    if made.ndim != 2 or made.shape[1] < 3 or made.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected (points, 3) numbers, found {tuple(made.shape)} of "
                        f"{made.dtype}")
    return made


def _npy(path: Path) -> Cloud:
    return Cloud(np.array(_array(path)[:, :3], dtype=np.float64))


class _Ply:
    """The head of a .ply: how its vertices lie."""

    def __init__(self, path: Path):
        self.path, self.data = path, path.read_bytes()
        end = self.data.find(b"end_header", 0, _HEAD)
        stop = self.data.find(b"\n", end)
        if not self.data.startswith(b"ply") or end < 0 or stop < 0:
            raise DataError(f"{path} is no PLY: it lacks "
                            + ("end_header" if self.data.startswith(b"ply") else "ply, its first "
                               "word"))
        self.begin = stop + 1
        self.order: str | None = None
        self.skipped, self.before, self.many, self._ahead = 0, 0, -1, 0
        self.fields: list[tuple[str, str]] = []
        element = ""
        for line in decode(self.data[:end], path, DataError).splitlines()[1:]:
            words = line.split()
            if words[:1] == ["format"]:
                self.order = _ORDER.get(words[1] if len(words) > 1 else "")
            elif words[:1] == ["element"]:
                element = self._element(words)
            elif words[:1] == ["property"]:
                self._property(words, element)
        if self.order is None:
            raise DataError(f"{path}: its format is none of {', '.join(_ORDER)}")
        if self.many < 0 or not {"x", "y", "z"} <= {n for n, _ in self.fields}:
            raise DataError(f"{path}: no element vertex has x, y and z")

    def _element(self, words: list[str]) -> str:
        if len(words) != 3 or not words[2].isdigit() or len(words[2]) > 10:
            raise DataError(f"{self.path}: {plain(' '.join(words), 60)!r} says no number of "
                            "elements")
        if words[1] == "vertex":
            self.many = int(words[2])
        elif self.many < 0:
            self.skipped, self._ahead = self.skipped + int(words[2]), int(words[2])
        return words[1]

    def _property(self, words: list[str], element: str) -> None:
        if len(words) == 3 and words[1] in _NUMBERS:
            if element == "vertex":
                self.fields.append((words[2], _NUMBERS[words[1]]))
            elif self.many < 0:
                self.before += int(_NUMBERS[words[1]][1]) * self._ahead
        elif element == "vertex" or self.many < 0:
            raise DataError(f"{self.path}: {plain(' '.join(words), 60)!r} in or before the vertices"
                            " is not read; points have one number each for x, y, z")

    def enough(self) -> None:
        """Raises DataError where fewer vertices are there than the head says."""
        if self.order:
            at = self.begin + self.before
            there = max(0, len(self.data) - at) // max(1, self.kind.itemsize)
        else:
            there = len(self.data[self.begin:].splitlines()) - self.skipped
        if there < self.many:
            raise DataError(f"{self.path} breaks off: it says {self.many} points, and "
                            f"{max(0, there)} are there")

    @property
    def kind(self) -> np.dtype[Any]:
        names = [n for n, _ in self.fields]
        if len(set(names)) < len(names):
            raise DataError(f"{self.path}: the vertices have a property twice")
        return np.dtype([(n, f"{self.order}{k}") for n, k in self.fields])

    def points(self) -> np.ndarray:
        self.enough()
        if self.order:
            rows = np.frombuffer(self.data, self.kind, self.many, self.begin + self.before)
            return np.stack([rows[k].astype(np.float64) for k in "xyz"], 1)
        at = [[n for n, _ in self.fields].index(k) for k in "xyz"]
        head = self.data[:self.begin].count(b"\n")
        lines = decode(self.data[self.begin:], self.path, DataError).splitlines()
        made = np.empty((self.many, 3))
        for i, line in enumerate(lines[self.skipped:self.skipped + self.many]):
            fields = line.split()
            try:
                made[i] = [float(fields[k]) for k in at]
            except (ValueError, IndexError):
                raise DataError(f"{self.path}, line {head + self.skipped + i + 1}: expected "
                                f"{len(self.fields)} numbers, found {plain(line, 60)!r}") from None
        return made


def _ply(path: Path) -> Cloud:
    return Cloud(_Ply(path).points())


_READERS = {".xyz": _xyz, ".off": _off, ".npy": _npy, ".ply": _ply}
