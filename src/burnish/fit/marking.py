"""Rows whose answers lean on what the user gave, with an indicator behind the user's words."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError
from . import chat, tools


@dataclass(frozen=True)
class Asked:
    """A conversation as text, and of each answer its stretch and those of the user before it."""

    marked: chat.Marked
    user: tuple[tuple[tuple[int, int], ...], ...]


def asked(tokenizer: Any, row: Mapping[str, Any], where: str = "") -> Asked:
    """Where the user's words stand. Raises DataError where a template rewrites them."""
    if "prompt" in row:
        made = chat.mark_completion(tokenizer, row["prompt"], row["completion"])
        return Asked(made, (((0, len(row["prompt"])),),))
    made = chat.mark(tokenizer, row["messages"], where, tools.of(row))
    spans: list[tuple[int, int]] = []
    per, at = [], 0
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            at = made.learnt[len(per)][1]
            per.append(tuple(spans))
            continue
        text = turn["content"].strip()
        start = made.text.find(text, at)
        if start < 0:
            raise DataError(f"{where}: the chat template rewrites what {turn['role']} says, so it "
                            "cannot be told from its frame")
        at = start + len(text)
        if turn["role"] == "user":
            spans.append((start, at))
    return Asked(made, tuple(per))


def texts(tokenizer: Any, rows: Sequence[Mapping[str, Any]], where: Callable[[int], str],
          max_length: int | None, device: Any = "cpu") -> Iterator[dict[str, Tensor]]:
    """Each row as the model reads it, whole, with the tokens of the user and of each response."""
    if not tokenizer.is_fast:
        raise ConfigError("where the user's words stand is told by a tokenizer that knows where "
                          "each token stands; give the fast one (a folder with tokenizer.json)")
    for i, row in enumerate(rows):
        told = asked(tokenizer, row, where(i))
        coded = tokenizer(told.marked.text, return_offsets_mapping=True, add_special_tokens=False)
        ids, places = list(coded["input_ids"]), list(coded["offset_mapping"])
        opens = tokenizer.bos_token_id
        if "prompt" in row and opens is not None and ids[:1] != [opens]:
            ids, places = [opens, *ids], [(0, 0), *places]
        if max_length is not None and len(ids) > max_length:
            raise DataError(f"{where(i)}: {len(ids)} tokens, and the seed model reads {max_length}")

        def over(spans: Sequence[tuple[int, int]], places: Any = places) -> list[bool]:
            return [b > a and any(a < stop and b > start for start, stop in spans)
                    for a, b in places]

        yield {"input_ids": torch.tensor([ids], device=device),
               "user": torch.tensor([over(spans) for spans in told.user]),
               "response": torch.tensor([over([span]) for span in told.marked.learnt])}


def indicated(row: Mapping[str, Any], which: Sequence[bool], indicator: str) -> dict[str, Any]:
    """The row with the indicator behind the user's words before each answer that is meant, and
    nothing else changed."""
    made = copy.deepcopy(dict(row))
    if "prompt" in made:
        if which[0]:
            text = made["prompt"]
            words = text.rstrip()
            made["prompt"] = f"{words}\n{indicator}{text[len(words):]}"
        return made
    answers, last = iter(which), None
    for turn in made["messages"]:
        if turn["role"] == "user":
            last = turn
        elif turn["role"] == "assistant" and next(answers) and last is not None:
            if not last["content"].endswith(f"\n{indicator}"):
                last["content"] += f"\n{indicator}"
    return made


@torch.no_grad()
def mark(model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], part: Any,
         where: Callable[[int], str] = lambda i: f"row {i}", max_length: int | None = None
         ) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """(rows with the indicator where a response leans on its context, the scores of each)."""
    device = next(model.parameters()).device
    scores = part.lifecycle(model, texts(tokenizer, rows, where, max_length, device))
    return [indicated(row, [bool(s > part.beta) for s in found], part.indicator)
            for row, found in zip(rows, scores, strict=True)], [s.tolist() for s in scores]
