"""Masked language models: words are hidden, and told by what stands on both sides of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError
from .. import words
from ..rows import Gaps, OneByOne, Rows
from .base import Batch
from .language import Written


class MaskedLanguageModelling(Written):
    """``input_ids``, ``labels`` (B, T): documents end to end, cut into rows of max_length, and 15 %
    of their tokens to be told: 80 % of those hidden, 10 % another word, 10 % as they were (BERT,
    2019). Every pass over the rows hides others; an evaluation always the same."""

    unlike = False
    usual_length = 512

    def prepare(self) -> None:
        super().prepare()
        if self.processor.mask_token is None:
            raise ConfigError("masked language modelling hides words behind the tokenizer's mask, "
                              "and this one has none; set tokenizer.mask_token")

    def make(self, split: str) -> Rows:
        return Gaps(self.data.splits[split], self.processor, self.max_length or 512, self.seed,
                    again=split == "train")

    def singly(self, split: str) -> Rows:
        return OneByOne(self.data.splits[split], lambda some: Gaps(
            some, self.processor, self.max_length or 512, self.seed, again=False))

    def check(self, model: nn.Module) -> None:
        known = words.words_of(model)
        for split in self.data.splits:
            rows = self.rows(split)
            assert isinstance(rows, Gaps)
            rows.words = min(rows.words, known or rows.words)      # what stands for another word
        super().check(model)

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.per_token(rows)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(outputs).flatten(0, 1), labels.flatten(),
                                           label_smoothing=smoothing)

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """The likeliest word at every mask of the text."""
        asked = self.encode(row)
        hidden = (asked["input_ids"][0] == self.processor.mask_token_id).nonzero().flatten()
        if not len(hidden):
            raise ConfigError(f"there is no {self.processor.mask_token} to fill in "
                              f"{row['text'][:60]!r}")
        share = self.logits(model(**asked))[0, hidden].float().softmax(-1)
        best, ids = share.max(-1)
        filled = asked["input_ids"][0].index_copy(0, hidden, ids)
        return {"text": self.processor.decode(filled, skip_special_tokens=True),
                "words": [self.processor.decode([i]).strip() for i in ids.tolist()],
                "probabilities": best.tolist()}
