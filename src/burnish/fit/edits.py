"""Edits of a language model: tables of answers that are to change, lessons, and the figures of one.

An edit is a prompt with the answer it should have. ``rephrased`` is another wording that should
have it too, ``local`` a text after which the model is to go on as it did.

    success    the share of edits whose answer has each of its tokens as the likeliest one
    general    the same of the other wordings
    local      the share of texts whose likeliest next token is as it was
    moved      mean KL(before || after) there, over all tokens of a text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import moved
from ..core.errors import DataError, nearest
from ..core.reading import plain as in_a_line
from .chat import Tokens, mark, mark_completion, tokenize
from .safety import asked
from .words import check_room

#: columns of a table of edits; of lessons all are needed
COLUMNS = ("prompt", "answer", "rephrased", "local")


@dataclass(frozen=True)
class Case:
    """where: for people.  rephrased, local: None where a row has none."""

    prompt: str
    answer: str
    rephrased: str | None
    local: str | None
    where: str


def cases(path: str | Path, lessons: bool = False) -> list[Case]:
    """Of a table with prompt and answer, and rephrased and local where they are there; lessons have
    all four. Raises DataError with the file, the row and the column."""
    from .layouts import TABLES, table

    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no table at {path}")
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{path}: edits are a table ({', '.join(sorted(TABLES))}) with the columns "
                        "prompt and answer")
    rows = table(path)
    needed = COLUMNS if lessons else COLUMNS[:2]
    for name in needed:
        if name not in rows.columns:
            raise DataError(f"{path} has no column {name!r}: "
                            f"{'lessons' if lessons else 'edits'} have {', '.join(needed)}; it has "
                            f"{', '.join(rows.columns)}{nearest(name, rows.columns)}")
    out = []
    for i, row in enumerate(rows.rows()):
        said = {}
        for name in COLUMNS:
            value = row.get(name)
            there = isinstance(value, str) and bool(value.strip())
            if not there and (name in needed or value not in (None, "")):
                raise DataError(f"{rows.where(i)}: {name} is text, and this is "
                                f"{in_a_line(repr(value), 60)}")
            said[name] = value if there else None
        out.append(Case(**said, where=rows.where(i)))    # type: ignore[arg-type]
    return out


class Wording:
    """Cases as batches of one row, as this model is asked: in its chat template, or plain."""

    def __init__(self, model: nn.Module, tokenizer: Any, plain: bool | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.plain = not getattr(tokenizer, "chat_template", None) if plain is None else plain
        self.device = next(model.parameters()).device

    def answered(self, prompt: str, answer: str, where: str = "") -> dict[str, Tensor]:
        """The answer's tokens are the labels, what ends it not: an answer is edited, and no
        habit of stopping."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        marked = mark_completion(self.tokenizer, prompt, answer) if self.plain else \
            mark(self.tokenizer, turns, where)
        made = tokenize(self.tokenizer, marked, None, special=self.plain)
        kept = self._trimmed(made)
        if not any(y != -100 for y in kept.labels):
            raise DataError(f"{where}: {in_a_line(answer, 60)!r} has no tokens")
        check_room(self.model, len(kept.input_ids), 0)
        batch = {"input_ids": torch.tensor([kept.input_ids]), "labels": torch.tensor([kept.labels])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return moved(batch, self.device)

    def _trimmed(self, made: Tokens) -> Tokens:
        """Without the last learnt token, which stops, and what comes after it."""
        at = max((i for i, y in enumerate(made.labels) if y != -100), default=0)
        return Tokens(made.input_ids[:at], made.labels[:at])

    def heard(self, text: str) -> dict[str, Tensor]:
        """A text that the model goes on from."""
        batch = asked(self.tokenizer, [text], plain=self.plain)
        check_room(self.model, batch["input_ids"].shape[1], 0)
        return moved(batch, self.device)

    def lesson(self, case: Case) -> tuple[dict[str, Tensor], ...]:
        assert case.rephrased is not None and case.local is not None
        return (self.answered(case.prompt, case.answer, case.where),
                self.answered(case.rephrased, case.answer, case.where), self.heard(case.local))

    def edit(self, some: Sequence[Case]) -> dict[str, Tensor]:
        """All of them as one batch, padded on the right."""
        rows = [self.answered(c.prompt, c.answer, c.where) for c in some]
        most = max(r["input_ids"].shape[1] for r in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": -100, "attention_mask": 0}
        return {k: torch.cat([nn.functional.pad(r[k], (0, most - r[k].shape[1]), value=v)
                              for r in rows]) for k, v in fill.items()}


@dataclass(frozen=True)
class Looked:
    """What a model says of some cases: right, again: bools; after: log-probabilities at each text
    that is to stay, (tokens, words)."""

    right: list[bool]
    again: list[bool]
    after: list[Tensor]


@torch.no_grad()
def look(wording: Wording, some: Sequence[Case]) -> Looked:
    model, was = wording.model, wording.model.training
    model.eval()
    try:
        right = [_says(model, wording.answered(c.prompt, c.answer, c.where)) for c in some]
        again = [_says(model, wording.answered(c.rephrased, c.answer, c.where))
                 for c in some if c.rephrased is not None]
        after = [model(**wording.heard(c.local)).logits[0].double().log_softmax(-1)
                 for c in some if c.local is not None]
    finally:
        model.train(was)
    return Looked(right, again, after)


def _says(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    labels = batch["labels"][0, 1:]
    given = {k: v for k, v in batch.items() if k != "labels"}
    found = model(**given).logits[0, :-1].argmax(-1)
    return bool((found == labels)[labels != -100].all())


def figures(before: Looked, after: Looked) -> dict[str, dict[str, float]]:
    """name -> before and after; general and local where rows say what to ask."""
    out = {"success": {"before": _share(before.right), "after": _share(after.right)}}
    if after.again:
        out["general"] = {"before": _share(before.again), "after": _share(after.again)}
    if after.after:
        pairs = list(zip(before.after, after.after, strict=True))
        stays = [bool(a[-1].argmax() == b[-1].argmax()) for a, b in pairs]
        kl = [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs]
        out["local"] = {"before": 1.0, "after": _share(stays)}
        out["moved"] = {"before": 0.0, "after": sum(kl) / len(kl)}
    return out


def _share(some: Sequence[bool]) -> float:
    return sum(some) / len(some)


def lessons(wording: Wording, some: Sequence[Case], epochs: int, seed: int
            ) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """Every lesson so many times, each time in another order."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(len(some), generator=draw).tolist():
            yield wording.lesson(some[i])
