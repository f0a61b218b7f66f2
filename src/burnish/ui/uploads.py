"""What a browser brings: files of the kinds that data come in, below ID/data, within a limit."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import ConfigError
from ..fit.clouds import CLOUDS
from ..fit.layouts import PROSE, TABLES
from ..fit.media import IMAGES, SOUNDS
from .places import NAME, Missing, Places, Refused
from .runs import ASKED

KINDS = TABLES | PROSE | IMAGES | SOUNDS | CLOUDS
#: bytes of one upload, files of one, and folders within folders
LIMIT, FILES, DEEP = 4 * 10**9, 200_000, 8


class TooMuch(Refused):
    """More than an upload may have."""


@dataclass
class Held:
    """Bytes and files of an upload."""

    size: int
    files: int


@dataclass
class Uploads:
    places: Places
    limit: int = LIMIT
    _held: dict[str, Held] = field(default_factory=dict, repr=False)

    async def take(self, upload: str, path: str, body: AsyncIterator[bytes],
                   announced: int | None = None) -> int:
        """Writes one file and returns its size. Nothing of it stays when it cannot be taken."""
        folder = self.places.run(upload)
        if not folder.is_dir() or folder.is_symlink() or (folder / ASKED).exists():
            raise Missing("no such upload")
        target = self._target(folder / "data", path)
        # of all files of the upload, those that are on their way too
        if upload not in self._held:
            self._held[upload] = _measured(folder / "data")
        held = self._held[upload]
        if held.files >= FILES:
            raise TooMuch(f"an upload has at most {FILES:,} files; give a folder below the root")
        self._fits(held.size + (announced or 0))
        held.files += 1
        written = 0
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as f:
                async for piece in body:
                    written += len(piece)
                    held.size += len(piece)
                    self._fits(held.size)
                    f.write(piece)
            os.link(part, target)                       # never over what is there
        except BaseException as e:
            held.size -= written
            held.files -= 1
            if isinstance(e, FileExistsError):
                raise ConfigError(f"{path} is there already") from None
            raise
        finally:
            part.unlink(missing_ok=True)
        return written

    def _fits(self, size: int) -> None:
        if size > self.limit:
            raise TooMuch(f"an upload holds at most {self.limit / 1e9:g} GB; put the data below "
                          "the folder that was opened and choose them there")

    def _target(self, top: Path, path: str) -> Path:
        parts = path.split("/")
        bad = [p for p in parts if not NAME.fullmatch(p) or p.endswith((" ", "."))]
        if bad or len(parts) > DEEP or len(path) > 1000:
            raise Refused(f"{path[:80]!r} is no name that an uploaded file may have")
        kind = Path(parts[-1]).suffix.lower()
        if kind not in KINDS:
            raise Refused(f"{parts[-1]!r} is no data: an upload holds "
                          f"{', '.join(sorted(KINDS))}")
        return top.joinpath(*parts)


def _measured(folder: Path) -> Held:
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return Held(sum(sizes), len(sizes))
