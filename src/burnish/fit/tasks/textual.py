"""Tasks of text: one tokenizer, whose ids and lengths the model must follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError
from .. import words
from .base import Batch, Task


class Textual(Task):
    unlike = True
    #: tokens of a row where nobody says how many; None: as many as the row has
    usual_length: ClassVar[int | None] = None

    def prepare(self) -> None:
        if self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token
            if self.processor.pad_token is None:
                raise ConfigError("the tokenizer has neither a padding nor an end-of-text token, "
                                  "so rows cannot be put together; set tokenizer.pad_token")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        self.notes += words.agree(model, self.processor, self.stops())
        asked, limit = self.max_length, self.processor.model_max_length
        self.max_length, notes = words.longest(
            model, asked, limit if limit and limit < 10**9 else None)
        if asked is None and self.usual_length is not None:
            self.max_length = min(self.usual_length, self.max_length or self.usual_length)
        self.notes += notes

    def stops(self) -> list[int]:
        """Ids that end an answer, beside the end of text."""
        return []

    def check(self, model: nn.Module) -> None:
        known = words.words_of(model)
        if known is not None and len(self.processor) > known:
            for split in self.data.splits:
                words.check_words(self.rows(split), known, f"{self.data.source}, {split}")

    def fast(self) -> None:
        """Raises ConfigError for a tokenizer that does not say which token is of which word."""
        if not self.processor.is_fast:
            raise ConfigError(f"{self.data.task} needs a tokenizer that knows where each token "
                              f"stands, and {type(self.processor).__name__} does not; give the "
                              "fast one (a folder with tokenizer.json)")

    def tell(self, split: str, notes: Sequence[str]) -> None:
        self.notes += [f"{split}: {n}" for n in notes]

    def encode(self, row: Mapping[str, Any]) -> Batch:
        return dict(self.processor(*[row[k] for k in self.takes if k in row], return_tensors="pt",
                                   truncation=self.max_length is not None,
                                   max_length=self.max_length))

    def padded(self, rows: Sequence[dict[str, Any]], side: str | None = None) -> Batch:
        """What the tokenizer wrote of each row, padded to the longest; all but the labels.

        side: where, whatever the tokenizer does: places of tokens stay what they are at the right.
        """
        known = self.processor.model_input_names
        return dict(self.processor.pad([{k: v for k, v in r.items() if k in known} for r in rows],
                                       return_tensors="pt", padding_side=side))

    def per_token(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """As :meth:`padded`, with a label for every token, -100 where there is none."""
        labels = [torch.as_tensor(r["labels"]) for r in rows]
        made = self.padded(rows)
        long = pad_sequence(labels, batch_first=True, padding_value=-100)
        if self.processor.padding_side == "left":
            long = pad_sequence([y.flip(0) for y in labels], batch_first=True,
                                padding_value=-100).flip(1)
        return made | {"labels": long}
