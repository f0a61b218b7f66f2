"""What is on a picture, written by a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError
from ..captioned import Captions, pair
from ..rows import Rows
from .base import Batch
from .writer import Told, Writer


class Pictured(Told, Captions):
    """Pictures with the tokens of what is on them."""

    def __init__(self, rows: Any, processor: Any, tokens: Sequence[Sequence[int]],
                 most: int | None, where: Any):
        super().__init__(rows, processor, tokens, where)
        self.notes = []
        self.told(rows["text"][:], tokens, most)

    def length(self, i: int) -> int:
        return len(self.tokens[i])

    def row(self, i: int) -> dict[str, Any]:
        made = super().row(self.sources[i])
        return {"pixel_values": made["pixel_values"], "labels": self.tokens[i]}


class ImageCaptioning(Writer):
    """``pixel_values`` (B, C, H, W), and what :class:`Writer` makes of the text; the decoder begins
    with the token that the model's config names."""

    metric = "rouge_l"
    greater_is_better = True
    takes = ("image",)

    def prepare(self) -> None:
        self.processor = pair(self.processor, self.data.task)
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length}: texts are as long as they are, up to "
                              "the places of the decoder; max_answer= says how much is written")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        decoder, encoder = getattr(config, "decoder", None), getattr(config, "encoder", None)
        if decoder is None or encoder is None:
            raise ConfigError(f"{type(model).__name__} has no decoder beside an encoder of "
                              "pictures; captions are served for vision encoder-decoders")
        side, made = getattr(encoder, "image_size", None), self.processor.picture
        if isinstance(side, int) and (made.height, made.width) != (side, side):
            raise ConfigError(f"{type(model).__name__} reads pictures of {side} x {side}, and its "
                              f"processor makes them {made.width} x {made.height}; give the "
                              "processor= that belongs to the model")
        self.begin(model, (), decoder.vocab_size, getattr(decoder, "max_position_embeddings", None))

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        made = Pictured(rows, self.processor, [self.ids(x) for x in rows["text"]], self.room,
                        self.data.where.get(split))
        self.notes += [f"{split}: {n}" for n in made.notes]
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows])} | self.taught(rows)

    def compared(self, said: list[str], right: list[str]) -> dict[str, float]:
        """Texts that are right as a whole, and the mean of :func:`rouge_l`."""
        same = [a == b for a, b in zip(said, right, strict=True)]
        near = [rouge_l(a, b) for a, b in zip(said, right, strict=True)]
        return {"rouge_l": sum(near) / len(near), "exact_match": sum(same) / len(same)}

    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed({"pixel_values": self.processor.picture(row["image"])[None]})


def rouge_l(said: str, right: str) -> float:
    """ROUGE-L (Lin, 2004): twice the words of the longest common subsequence over all words of the
    two texts, in small letters."""
    a, b = said.lower().split(), right.lower().split()
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[-1], before[j + 1]))
    return 2 * row[-1] / (len(a) + len(b))
