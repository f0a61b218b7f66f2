"""Rows that are files: pictures and sounds, made into tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.errors import DataError
from . import sounds
from .media import opened
from .rows import Rows

#: tensors of a split that are kept once they are made, in bytes
KEEP_BYTES = 128 * 2**20


class Kept(Rows):
    """Rows whose tensors are kept, as many as KEEP_BYTES hold."""

    def __init__(self, rows: Any, where: Callable[[int], str] | None):
        self.rows = rows
        self.where = where or (lambda i: f"row {i}")
        self.kept: dict[int, dict[str, Any]] = {}
        self.room = KEEP_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, i: int) -> dict[str, Any]:
        """The row itself; DataError with where it stands for a picture that breaks off."""
        return opened(self.rows, i, self.where)

    def read(self, i: int) -> dict[str, Any]:
        """The tensors of a row, from its file."""
        raise NotImplementedError

    def row(self, i: int) -> dict[str, Any]:
        made = self.kept.get(i)
        if made is None:
            made = self.read(i)
            size = sum(v.nbytes for v in made.values() if isinstance(v, torch.Tensor))
            if size <= self.room:
                self.room -= size
                self.kept[i] = made
        return made


class Pictures(Kept):
    """``pixel_values`` (C, H, W) and ``labels``."""

    def __init__(self, rows: Any, processor: Any, where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.processor, self.labels = processor, rows["label"][:]

    def read(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.processor(picture(self.opened(i)["image"], self.where(i))),
                "labels": self.labels[i]}


def picture(image: Any, at: str) -> Any:
    """A picture with its pixels read; DataError with where it stands otherwise."""
    try:
        image.load()
    except Exception as e:
        raise DataError(f"{at}: the picture cannot be read: {e}") from None
    return image


class Sounds(Kept):
    """What the feature extractor makes of a recording, and ``labels``, one a row.

    samples: of each row at the extractor's sampling rate, before it cuts or fills them.
    limit: seconds of a row that are heard.
    """

    def __init__(self, rows: Any, labels: Sequence[Any], extractor: Any, limit: float | None,
                 where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.extractor, self.limit, self.labels = extractor, limit, labels
        rate, self.samples, cut, self.changed = extractor.sampling_rate, [], 0, 0
        for i in range(len(rows)):
            many, own = self._said(i, sounds.size, rows[i]["audio"])
            cut += limit is not None and many > round(limit * own)
            self.changed += own != rate
            self.samples.append(sounds.length(many, own, rate, limit))
        self.notes = [f"{cut} of {len(rows)} sounds are longer than {limit:g} s, and are heard up "
                      "to there"] if cut else []
        if self.changed:
            self.notes.append(f"{self.changed} of {len(rows)} sounds are resampled to {rate} Hz, "
                              "which the model hears")

    def _said(self, i: int, read: Callable[..., Any], *given: Any) -> Any:
        try:
            return read(*given)
        except Exception as e:
            raise DataError(f"{self.where(i)}: the sound cannot be read: {e}") from None

    def length(self, i: int) -> int:
        return self.samples[i]

    def read(self, i: int) -> dict[str, Any]:
        heard = self._said(i, extracted, self.extractor, self.rows[i]["audio"], self.limit)
        return heard | {"labels": self.labels[i]}


def extracted(extractor: Any, source: Any, limit: float | None) -> dict[str, torch.Tensor]:
    """The extractor's tensors of one recording, as it makes them of one that stands alone."""
    x = sounds.heard(source, extractor.sampling_rate, limit)
    made = extractor(x, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    return {k: v[0] for k, v in made.items()}


class Scenes(Kept):
    """What `make` makes of a picture and its mask."""

    def __init__(self, rows: Any, make: Callable[[Any, Any], dict[str, torch.Tensor]],
                 where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.make = make

    def read(self, i: int) -> dict[str, Any]:
        row = self.opened(i)
        image = picture(row["image"], self.where(i))
        try:
            return self.make(image, picture(row["mask"], self.where(i)))
        except ValueError as e:
            raise DataError(f"{self.where(i)}: {e}") from None
