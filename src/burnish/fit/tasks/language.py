"""Language models: documents end to end, and conversations of which the answers are learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .. import packs, tools, words
from ..rows import Documents, OneByOne, Rows, Turns
from ..shots import Shots
from .base import Batch
from .textual import Textual


class Written(Textual):
    """Tasks whose answers are words: figures per token."""

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        answers, labels = torch.as_tensor(answers), torch.as_tensor(labels)
        asked = (labels != -100) & (answers != -100)
        return {"token_accuracy": (answers == labels)[asked].double().mean().item()}

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """As for every task, with ``perplexity``, e to the loss per token."""
        found = super().figures(answers, losses, labels, rows)
        return {**found, "perplexity": math.exp(min(found["loss"], 700.0))}

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return per_word(logits, labels)


class LanguageModelling(Written):
    """``input_ids``, ``labels`` (B, T): documents end to end, cut into rows of max_length.

    ``packing``: rows that are read to be learnt stand in sequences of max_length tokens, with
    ``position_ids`` (B, T), and none sees another (:mod:`burnish.fit.packs`); documents are then
    each by itself, also where they are looked at.
    """

    settings = ("packing",)
    unlike = False
    usual_length = 512
    counts_items = True

    def prepare(self) -> None:
        from ..chat import prepare_tokenizer

        prepare_tokenizer(self.processor)

    @property
    def packing(self) -> bool:
        return bool(self.how.get("packing"))

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        if self.packing:
            packs.takes_places(model)
            model.config.use_cache = False               # with it no model looks where rows begin

    def make(self, split: str) -> Rows:
        rows, size = self.data.splits[split], self.max_length or 512
        if self.packing:
            return self.packed(split, packs.Pieces(rows, self.processor, size))
        return Documents(rows, self.processor, size)

    def packed(self, split: str, alone: Rows) -> Rows:
        """The rows of a split, in sequences where they are to be learnt."""
        if not self.packing or split != "train":
            return alone
        made = packs.Packed(alone, int(self.max_length or 512), self.seed)
        self.tell(split, made.notes)
        return made

    def singly(self, split: str) -> Rows:
        return OneByOne(self.data.splits[split], lambda some: Documents(
            some, self.processor, self.max_length or 512))

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        if "position_ids" in rows[0]:
            return packs.together(rows, self.processor.pad_token_id)
        return pad_tokens(rows, self.processor.pad_token_id)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        logits = self.logits(outputs)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(),
                                           label_smoothing=smoothing)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        guess = logits.argmax(-1)
        # position t answers for token t + 1: aligned here, so that measure compares as they stand
        return torch.cat([torch.full_like(guess[:, :1], -100), guess[:, :-1]], 1)

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return per_word(logits[:, :-1], labels[:, 1:])

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        asked = self.encode(row)
        most = words.room(model, asked["input_ids"].shape[1], tokens)
        made = model.generate(  # type: ignore[operator]
            **asked, max_new_tokens=most, do_sample=False,
            pad_token_id=self.processor.pad_token_id)
        return {"text": self.processor.decode(made[0, asked["input_ids"].shape[1]:],
                                              skip_special_tokens=True)}


class InstructionTuning(LanguageModelling):
    """As language modelling, row by row, with ``labels`` -100 wherever nothing is learnt.

    ``shots``: so many rows of the data stand in one sequence (:mod:`burnish.fit.shots`).
    """

    unlike = True
    usual_length = None
    settings = ("shots", "packing")

    def make(self, split: str) -> Rows:
        shots = int(self.how.get("shots", 1))
        made = self._turns(split) if shots == 1 else Shots(
            self.data.splits[split], self.processor, self.max_length, self.data.where.get(split),
            shots=shots, seed=self.seed, again=split == "train", keys=self.data.keys)
        self.tell(split, made.notes)
        return self.packed(split, made)

    def singly(self, split: str) -> Rows:
        alone = self.how.get("shots", 1) == 1 and not self.packing
        return self.rows(split) if alone else self._turns(split)

    def _turns(self, split: str) -> Turns:
        return Turns(self.data.splits[split], self.processor, self.max_length,
                     self.data.where.get(split))

    def stops(self) -> list[int]:
        from ..chat import stop_ids

        return stop_ids(self.processor)

    def encode(self, row: Mapping[str, Any]) -> Batch:
        if self.data.form == "completion":                  # no template in training, none here
            text, opens = row["text"], self.processor.bos_token_id
            ids = self.processor(text, add_special_tokens=False)["input_ids"]
            ids = [*([opens] if opens is not None and ids[:1] != [opens] else []), *ids]
            return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids),
                                                                                   dtype=torch.long)}
        turn, offer = [{"role": "user", "content": row["text"]}], tools.of(row)
        return dict(self.processor.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True,
            **({"tools": offer} if offer else {})))

    def preview(self, n: int = 3) -> list[str]:
        """As the model sees them, with what is learnt between guillemets."""
        from ..chat import show

        tokens = self.rows("train").tokens  # type: ignore[attr-defined]
        return [show(self.processor, t) for t in tokens[:n]]


def per_word(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows, 2): as :meth:`Task.losses`; fp32 for one row's words at a time."""
    rows = []
    for row, wanted in zip(logits, labels, strict=True):
        rows.append(torch.stack([nn.functional.cross_entropy(
            row.float(), wanted, reduction="sum"), (wanted != -100).sum().float()]))
    return torch.stack(rows)


def pad_tokens(rows: Sequence[dict[str, Any]], pad: int) -> Batch:
    """Right-padded to the longest row: ids with `pad`, labels with -100, mask with 0."""
    ids = [torch.as_tensor(r["input_ids"]) for r in rows]
    labels = [torch.as_tensor(r["labels"]) for r in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
