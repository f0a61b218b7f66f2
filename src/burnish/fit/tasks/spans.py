"""Questions about a context, answered by a stretch of it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rows import Rows, Windows
from .base import Batch
from .textual import Textual

#: tokens of the longest answer, and beginnings and ends that are tried with each other
LONGEST, TRIED = 30, 20


class QuestionAnswering(Textual):
    """``input_ids`` (B, T) of question and context, ``start_positions`` and ``end_positions`` (B,).

    A context longer than max_length is read in windows that overlap by a third; an answer that a
    window lacks is at its first token, which says "not here". (SQuAD, 2016 and 2018.)
    """

    metric = "f1"
    greater_is_better = True
    smooths = False
    usual_length = 384
    takes = ("question", "context")
    truth = ("start_positions", "end_positions")
    #: whether training has shown questions without an answer: a run says it, and its predictions
    #: always answer where it has not
    settings = ("unanswerable",)

    def prepare(self) -> None:
        super().prepare()
        self.fast()

    def make(self, split: str) -> Rows:
        made = Windows(self.data.splits[split], self.processor, self.max_length or 384,
                       self.data.where.get(split))
        self.tell(split, made.notes)
        if split == "train":
            self.how["unanswerable"] = made.silent
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        ends = {k: torch.tensor([r[k] for r in rows]) for k in self.truth}
        return self.padded(rows, "right") | ends

    def logits(self, outputs: Any) -> torch.Tensor:
        """(B, T, 2): of beginnings and of ends."""
        if isinstance(outputs, torch.Tensor):
            return outputs
        pair = outputs[:2] if isinstance(outputs, tuple) else (
            outputs["start_logits"], outputs["end_logits"])
        return torch.stack(tuple(pair), -1)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return self.losses(self.logits(outputs), labels)[:, 0].mean()

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        both = torch.stack([nn.functional.cross_entropy(logits[..., k].float(), labels[:, k],
                                                        reduction="none") for k in (0, 1)], -1)
        return torch.stack([both.mean(-1), torch.ones_like(both[:, 0])], -1)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(B, 2, 2, TRIED + 1): of beginnings and of ends the likeliest places and their logits,
        and the first token's."""
        logits = logits.float().transpose(1, 2)
        top, at = logits.topk(min(TRIED, logits.shape[-1]), -1)
        short = TRIED - top.shape[-1]
        top = nn.functional.pad(top, (0, short), value=float("-inf"))
        at = nn.functional.pad(at, (0, short))
        first = logits[..., :1]
        return torch.stack([torch.cat([at.float(), torch.zeros_like(first)], -1),
                            torch.cat([top, first], -1)], 2)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        return {}

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """The loss, and over questions how many are answered to the letter and the F1 of words,
        each beside the likest of the right answers."""
        found = super().figures(answers, losses, labels, rows)
        assert isinstance(rows, Windows)
        said = best(torch.as_tensor(answers), rows)
        exact = [max(float(plain(a) == plain(t)) for t in right or [""])
                 for a, right in zip(said, rows.right, strict=True)]
        f1 = [max(overlap(a, t) for t in right or [""])
              for a, right in zip(said, rows.right, strict=True)]
        many = max(len(said), 1)
        return {**found, "exact_match": sum(exact) / many, "f1": sum(f1) / many}

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        asked = {"context": [row["context"]], "question": [row["question"]], "answers": [
            {"text": [], "answer_start": []}]}
        rows = Windows(asked, self.processor, self.max_length or 384)
        kept = []
        for i in range(len(rows)):
            batch = self.together([rows[i]])
            kept.append(self.reduce(self.logits(model(**self.feed(batch))), self.right(batch))[0])
        rows.silent = self.how.get("unanswerable", True)
        return {"text": best(torch.stack(kept), rows)[0]}

    def said(self, answer: Mapping[str, Any]) -> str:
        return answer["text"] or "(the context does not say)"


def best(kept: torch.Tensor, rows: Windows) -> list[str]:
    """The likeliest stretch for every question over its windows; "" where the context does not say.

    kept: as :meth:`QuestionAnswering.reduce` leaves them. A stretch lies in the context, ends no
    more than LONGEST tokens behind its beginning, and counts by the sum of its two logits; none at
    all counts by the lowest sum at the first token over the windows, where any question may have no
    answer.
    """
    found: list[tuple[float, str]] = [(float("-inf"), "")] * len(rows.right)
    none = [float("inf")] * len(rows.right)
    for i, window in enumerate(kept):
        (starts, s), (ends, e) = window
        which, context, places = rows.question[i], rows.text(i), rows.places[i]
        none[which] = min(none[which], float(s[-1] + e[-1]))
        for b, x in zip(starts[:-1].int().tolist(), s[:-1].tolist(), strict=True):
            for c, y in zip(ends[:-1].int().tolist(), e[:-1].tolist(), strict=True):
                inside = b in places and c in places and b <= c < b + LONGEST
                if inside and x + y > found[which][0]:
                    found[which] = x + y, context[places[b][0]:places[c][1]]
    return ["" if rows.silent and score < none[k] else text
            for k, (score, text) in enumerate(found)]


def plain(text: str) -> str:
    """In small letters, without punctuation, articles and double spaces, as SQuAD compares."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap(said: str, true: str) -> float:
    """F1 of the words of two answers."""
    a, b = plain(said).split(), plain(true).split()
    if not a or not b:
        return float(a == b)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))
