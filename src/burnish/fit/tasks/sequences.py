"""Encoder-decoders: a prompt is read, its answer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..rows import Answers, Rows
from .base import Batch
from .language import Written


class SequenceToSequence(Written):
    """``input_ids``, ``attention_mask`` (B, S) of the prompts, ``labels`` (B, T) of the answers,
    which the model reads shifted by one."""

    smooths = False                        # a smoother takes the labels, which the decoder reads

    def make(self, split: str) -> Rows:
        made = Answers(self.data.splits[split], self.processor, self.max_length)
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        labels = [torch.tensor(r["labels"]) for r in rows]
        return self.padded(rows) | {
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}

    def feed(self, batch: Batch) -> Batch:
        return batch                                   # the decoder reads the answer so far

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(outputs).flatten(0, 1), labels.flatten(),
                                           label_smoothing=smoothing)

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        made = model.generate(**self.encode(row), max_new_tokens=tokens,  # type: ignore[operator]
                              do_sample=False)
        return {"text": self.processor.decode(made[0], skip_special_tokens=True)}
