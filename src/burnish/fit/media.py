"""Files that rows are made of, beside words: pictures, sounds and clouds of points, one a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.reading import plain, regular
from .clouds import CLOUDS, looked
from .sounds import size

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
                    ".pgm"})
SOUNDS = frozenset({".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff"})

#: files opened to see whether they are what they are called before training starts; the rest are
#: checked when they are read
LOOKED_AT = 20_000


@dataclass(frozen=True)
class Medium:
    """role: the column. opened: raises whatever is wrong with a file."""

    role: str
    word: str
    suffixes: frozenset[str]
    opened: Callable[[str], object]

    def among(self, folder: Path) -> list[Path]:
        """Its files in a folder, at any depth, in order."""
        return sorted(p for p in folder.rglob("*") if self.is_one(p))

    def is_one(self, path: str | Path) -> bool:
        return Path(path).suffix.lower() in self.suffixes

    def look(self, paths: Sequence[str]) -> None:
        """Opens files (evenly spread where there are very many) and names the first broken one."""
        for p in paths:                          # a pipe among them would be read for ever
            regular(p, DataError)
        for p in paths[:: max(1, len(paths) // LOOKED_AT)]:
            try:
                self.opened(p)
            except DataError:                    # says where by itself
                raise
            except Exception as e:
                raise DataError(f"{self.word} {plain(p)} cannot be read: {plain(e)}") from None


def _picture(path: str) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.verify()


PICTURE = Medium("image", "picture", IMAGES, _picture)
SOUND = Medium("audio", "sound", SOUNDS, size)
CLOUD = Medium("cloud", "cloud", CLOUDS, looked)
MEDIA = (PICTURE, SOUND, CLOUD)


def opened(rows: Any, i: int, where: Callable[[int], str] | None = None) -> dict[str, Any]:
    """A row of a `datasets` table; DataError with where it stands for a picture that breaks off,
    which shows where it is decoded only."""
    try:
        row: dict[str, Any] = rows[i]
        return row
    except Exception as e:
        at = where(i) if where else f"row {i}"
        raise DataError(f"{at}: the picture cannot be read: {plain(e)}") from None


def held(folder: Path) -> list[Medium]:
    """What of pictures, sounds and clouds a folder holds."""
    there = {p.suffix.lower() for p in folder.rglob("*")}
    return [m for m in MEDIA if there & m.suffixes]
