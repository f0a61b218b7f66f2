"""Reports of simulations that were made before, on disk.

A report follows from the config, the recipe, the batch, the device and the code; all of them are in
its name, so an entry is never old: other code asks for another name. An entry that cannot be read
is made again. Two processes may write at once: each writes a file of its own and moves it into
place, and whichever comes last has written the same.

The folder is ``BURNISH_CACHE``, else the platform's place for caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError
from .report import MemoryReport

#: entries kept; the oldest half goes when there are more
MOST = 4000


def folder() -> Path:
    """Where entries are kept."""
    if said := os.environ.get("BURNISH_CACHE"):
        return Path(said).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "burnish" / "plans"


class Refused(BurnishError):
    """A recipe that the model refused when it was simulated."""


class Reports:
    """Reports of one question (a config, a device, settings) by recipe and batch.

    about: everything that a report follows from beside recipe, batch and code; JSON types.
    """

    def __init__(self, about: Any, where: Path | None = None):
        self.about = json.dumps(about, sort_keys=True, default=str)
        self.where = where or folder()

    def get(self, recipe: str, batch: Any, make: Callable[[], MemoryReport]) -> MemoryReport:
        """The report of `recipe` for `batch`, made where it is not here. Raises Refused again with
        what `make` raised as a BurnishError before."""
        path = self.path(recipe, batch)
        found = self._read(path)
        if isinstance(found, str):
            raise Refused(found)
        if found is not None:
            return found
        try:
            report = make()
        except BurnishError as error:
            self._write(path, {"refused": str(error)})
            raise
        self._write(path, {"report": report.to_dict()})
        return report

    def path(self, recipe: str, batch: Any) -> Path:
        text = json.dumps([self.about, recipe, batch, _surroundings()], default=str)
        return self.where / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _read(self, path: Path) -> MemoryReport | str | None:
        try:
            data = json.loads(path.read_text("utf-8"))
            if "refused" in data:
                return str(data["refused"])
            return MemoryReport.from_dict(data["report"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError,
                BurnishError):
            return None

    def _write(self, path: Path, data: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):     # a full or forbidden disk costs time, nothing else
            self.where.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.where, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(data, file)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    def tidy(self) -> None:
        """Let the oldest half go where there are more than :data:`MOST`."""
        with contextlib.suppress(OSError):
            files = [f for f in self.where.iterdir() if f.suffix in (".json", ".part")]
            if len(files) > MOST:
                for f in sorted(files, key=lambda f: f.stat().st_mtime)[: len(files) // 2]:
                    f.unlink(missing_ok=True)


@cache
def _surroundings() -> dict[str, str]:
    """Versions, machine, and the hash of burnish's own code."""
    import torch
    import transformers

    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return {"code": digest.hexdigest(), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "machine": f"{sys.platform} {platform.machine()}",
            "accelerator": str(torch.cuda.is_available())}
