"""Pictures with texts: what reads both, and the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .from_files import Kept, picture
from .pictures import Picture, picture_of


@dataclass
class Captioned:
    """What makes a tensor of a picture, and what cuts a text into tokens."""

    picture: Picture
    tokenizer: Any

    def save_pretrained(self, folder: str | Path) -> None:
        self.picture.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def pair(processor: Any, task: str) -> Captioned:
    """`processor` as such, transformers' own pair among others."""
    if isinstance(processor, Captioned):
        return processor
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return Captioned(picture_of(processor.image_processor.to_dict()), processor.tokenizer)
    raise ConfigError(f"{task} reads pictures and texts, and {type(processor).__name__} does not "
                      "read both; give processor= with a model folder that has a tokenizer and a "
                      "preprocessor_config.json")


class Captions(Kept):
    """``pixel_values`` (C, H, W) and the tokens of a text, ``ids``; texts: as they stand."""

    def __init__(self, rows: Any, processor: Captioned, ids: Sequence[Sequence[int]],
                 where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.processor, self.ids = processor, ids
        self.texts: list[str] = rows["text"][:]

    def length(self, i: int) -> int:
        return len(self.ids[i])

    def read(self, i: int) -> dict[str, Any]:
        made = self.processor.picture(picture(self.opened(i)["image"], self.where(i)))
        return {"pixel_values": made, "ids": self.ids[i]}
