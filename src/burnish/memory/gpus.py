"""Cards by name: how much of their memory a program gets, and what their makers say of their speed.

A card shows less than its board holds: ECC on GDDR6 takes a sixteenth, and driver and firmware keep
a part back. `HELD_BACK` of the rest is taken off: about what lacks in the "total capacity" of
CUDA's own messages of full memory (some 23.6 of 24 GiB on an RTX 4090, 139 of 141 on an H200), and
assumed of cards for which no such message was seen. The context of the process comes off as well,
in search.py, as it does of a budget in bytes.

Apple's chips share the host's memory; Metal advises to stay within about three quarters of it
(``torch.mps.recommended_max_memory()`` tells the exact figure of a machine).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files

from ..core.errors import ConfigError, nearest
from ..core.reading import shown

#: share of a card's memory that no program sees
HELD_BACK = 0.03
#: share of GDDR6 that holds the check bits
ECC = 1 / 16
#: share of unified memory that Metal advises to take
UNIFIED = 0.75

GiB = 1 << 30
#: makers and lines that people write or leave out
_MAKERS = re.compile(r"\b(nvidia|amd|apple|geforce|quadro|tesla|instinct|radeon|graphics|card|gpu|"
                     r"silicon|sxm[0-9]?|hbm[0-9]e?|tensor core|pcie|gddr[0-9]x?)\b")
_SIZE = re.compile(r"(?<![0-9])([0-9]{1,3}) ?(?:gb|gib)\b")


@dataclass(frozen=True)
class Gpu:
    """memory: GiB on the board. single, half: published peak operations/s of products in fp32 and
    in 16 bits; bandwidth: bytes/s. kind: what torch calls the device type."""

    name: str
    memory: float
    single: float
    half: float
    bandwidth: float
    kind: str = "cuda"
    ecc: bool = False

    @property
    def shows(self) -> int:
        """Bytes that a program finds there, less nothing of its own yet."""
        if self.kind == "mps":
            return int(self.memory * GiB * UNIFIED)
        return int(self.memory * GiB * (1 - ECC * self.ecc) * (1 - HELD_BACK))

    @property
    def label(self) -> str:
        """The name with its memory: ``RTX 4090 (24 GB)``."""
        return self.name if _SIZE.search(self.name.lower()) else f"{self.name} ({self.memory:g} GB)"

    @property
    def why(self) -> str:
        """Where the bytes go that it does not show."""
        if self.kind == "mps":
            return f"{UNIFIED:.0%} of {self.memory:g} GiB, which Metal advises to take"
        kept = "ECC and " if self.ecc else ""
        return f"{self.memory:g} GiB less what {kept}driver and firmware keep"


@lru_cache(maxsize=1)
def cards() -> tuple[Gpu, ...]:
    """Every card of gpus.json, by memory, then by speed."""
    data = json.loads(files("burnish.memory").joinpath("gpus.json").read_text("utf-8"))
    found = [Gpu(c["name"], c["memory"], c["single"] * 1e12, c["half"] * 1e12,
                 c["bandwidth"] * 1e9, c.get("kind", "cuda"), c.get("ecc", False))
             for c in data["cards"]]
    return tuple(sorted(found, key=lambda c: (c.shows, c.half)))


def gpu(name: str) -> Gpu:
    """The card that `name` means; case, spaces, dashes and the maker's name do not matter.

    ``"rtx4090"``, ``"NVIDIA GeForce RTX 4090"``, ``"A100-80GB"``, ``"M2 Max 64GB"`` (Apple's chips
    come with any memory). Of a card of several sizes one has to be named. Raises ConfigError with
    the nearest names.
    """
    said = shown(name, 60)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{said} names no card; write for example 'RTX 4090'")
    word, size = _plain(name[:200])
    same = [c for c in cards() if _plain(c.name)[0] == word]
    same = [c for c in same if "pcie" in c.name.lower()] or same if "pcie" in name.lower() else \
        [c for c in same if "pcie" not in c.name.lower()]
    if not same:
        near = " ".join(_MAKERS.sub(" ", name[:200].lower()).split()).upper()
        raise ConfigError(f"unknown card {said}{nearest(near, [c.name for c in cards()])}; any "
                          "other is described by memory= and device=")
    if same[0].kind == "mps":
        return replace(same[0], memory=float(size or same[0].memory))
    sizes = sorted({c.memory for c in same})
    fits = [c for c in same if size is None or c.memory == size]
    if not fits:
        raise ConfigError(f"{same[0].name} has {' or '.join(f'{s:g}' for s in sizes)} GB, not "
                          f"{size}")
    if len(fits) > 1:
        raise ConfigError(f"{said} comes with {' or '.join(f'{s:g}' for s in sizes)} GB; say "
                          f"which: {', '.join(repr(c.name) for c in fits)}")
    return fits[0]


def smallest(needs: int, kind: str = "cuda") -> Gpu | None:
    """The card with the least memory that shows so many bytes; the quickest of several."""
    fits = [c for c in cards() if c.kind == kind and c.shows >= needs]
    least = min((c.shows for c in fits), default=0)
    return max((c for c in fits if c.shows == least), key=lambda c: c.half, default=None)


def smaller(bytes_: int, kind: str = "cuda") -> Gpu | None:
    """The largest card that shows less than so many bytes."""
    fits = [c for c in cards() if c.kind == kind and c.shows < bytes_]
    return max(fits, key=lambda c: (c.shows, c.half), default=None)


def _plain(name: str) -> tuple[str, int | None]:
    """(letters and digits alone, GB where they are named)."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    sized = _SIZE.search(text)
    text = _MAKERS.sub(" ", _SIZE.sub(" ", text))
    return re.sub(r"[^a-z0-9]", "", text), int(sized.group(1)) if sized else None
