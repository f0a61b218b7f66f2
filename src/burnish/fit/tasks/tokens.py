"""A tag for every word: names, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..heads import resize_head
from ..rows import Rows, Tagged
from .base import Batch
from .named import Named
from .textual import Textual


class TokenClassification(Textual, Named):
    """``input_ids``, ``labels`` (B, T): a word's tag at its first token, -100 at all others."""

    metric = "f1"
    greater_is_better = True
    takes = ("tokens",)

    def prepare(self) -> None:
        super().prepare()
        self.fast()

    def fit_head(self, model: nn.Module) -> nn.Module:
        return resize_head(model, self.names)

    def make(self, split: str) -> Rows:
        made = Tagged(self.data.splits[split], self.processor, self.max_length)
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.per_token(rows)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(outputs).flatten(0, 1), labels.flatten(),
                                           label_smoothing=smoothing)

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        sums = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        return torch.stack([sums.sum(-1), (labels != -100).sum(-1).float()], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """Accuracy over words. Where tags begin with B- and I-, precision, recall and F1 of whole
        spans (begin, end and kind all right); else F1 averaged over the tags that occur."""
        from .classes import classification

        said, true = torch.as_tensor(answers), torch.as_tensor(labels)
        names, asked = self.data.labels or (), true != -100
        plain = classification(said[asked], true[asked], len(names))
        if not any(n.startswith("B-") for n in names):
            return plain
        hit = found = there = 0
        for row, want, keep in zip(said, true, asked, strict=True):
            ours, theirs = ({s for s in spans([names[int(t)] for t in tags[keep]])}
                            for tags in (row, want))
            hit, found, there = hit + len(ours & theirs), found + len(ours), there + len(theirs)
        return {"accuracy": plain["accuracy"], "precision": hit / max(found, 1),
                "recall": hit / max(there, 1), "f1": 2 * hit / max(found + there, 1)}

    def preview(self, n: int = 3) -> list[str]:
        """Words, each with its tag where it has one."""
        rows, names = self.data.train, self.data.labels or ()
        return [" ".join(w if names[t] == "O" else f"{w}/{names[t]}"
                         for w, t in zip(rows[i]["tokens"][:24], rows[i]["tags"], strict=False))
                for i in range(0, len(rows), max(1, len(rows) // max(1, n)))][:n]

    # -- answers to people -------------------------------------------------------------------
    def encode(self, row: Mapping[str, Any]) -> Batch:
        return dict(self._coded(self._words(row)))

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        words, names = self._words(row), self.data.labels or ()
        coded = self._coded(words)
        guess = self.logits(model(**coded))[0].argmax(-1).tolist()
        tags: dict[int, str] = {}
        for place, word in enumerate(coded.word_ids(0)):
            if word is not None:
                tags.setdefault(word, names[guess[place]])
        return {"words": words, "tags": [tags.get(i) for i in range(len(words))]}

    def said(self, answer: Mapping[str, Any]) -> str:
        return " ".join(w if t in (None, "O") else f"{w}/{t}"
                        for w, t in zip(answer["words"], answer["tags"], strict=True))

    def _words(self, row: Mapping[str, Any]) -> list[str]:
        given = row["tokens"]
        return given.split() if isinstance(given, str) else list(given)

    def _coded(self, words: list[str]) -> Any:
        return self.processor(words, is_split_into_words=True, return_tensors="pt",
                              truncation=self.max_length is not None, max_length=self.max_length)


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first word, one past the last) of every span of a row. One begins at B-, or at an I-
    behind another kind or behind nothing, as the CoNLL script counts; E- and L- end one, S- and U-
    are one word."""
    kind, begin = "", 0
    for i, tag in enumerate([*tags, "O"]):
        head, _, name = tag.partition("-")
        if kind and (head not in ("I", "E", "L") or name != kind):
            yield kind, begin, i
            kind = ""
        if head in ("B", "I", "E", "L", "S", "U") and not kind:
            kind, begin = name, i
        if head in ("E", "L", "S", "U") and kind:
            yield kind, begin, i + 1
            kind = ""
