"""Rows as tensors, made when they are asked for and kept where they are small.

Nothing here draws from a random generator, so that a row is the same in a run that was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Dataset

from ..core.errors import DataError
from . import chat

#: pictures are kept as tensors when the whole split takes no more than this
KEEP_BYTES = 128 * 2**20


class Rows(Dataset):
    """A torch data set that knows how long each row is (all alike unless it says otherwise).

    context: keys that the recipe reads beside the row, an entry per row of the data.
    """

    context: Mapping[str, Sequence[int]] = MappingProxyType({})

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.row(i)
        return row if not self.context else \
            row | {k: v[self.source(i)] for k, v in self.context.items()}

    def row(self, i: int) -> dict[str, Any]:
        raise NotImplementedError

    def source(self, i: int) -> int:
        """The row of the data that row i was made of."""
        return i

    def length(self, i: int) -> int:
        return 1


class Pictures(Rows):
    def __init__(self, rows: Any, processor: Any, where: Callable[[int], str] | None):
        self.rows, self.processor = rows, processor
        self.where = where or (lambda i: f"row {i}")
        self.labels = rows["label"][:]
        self.kept: dict[int, torch.Tensor] = {}
        self.keep = False
        if len(self):
            x = self._read(0)
            self.keep = x.numel() * x.element_size() * len(self) <= KEEP_BYTES

    def __len__(self) -> int:
        return len(self.labels)

    def _read(self, i: int) -> torch.Tensor:
        try:
            image = self.rows[i]["image"]
            image.load()
        except Exception as e:
            raise DataError(f"{self.where(i)}: the picture cannot be read: {e}") from None
        return self.processor(image)

    def row(self, i: int) -> dict[str, Any]:
        x = self.kept.get(i)
        if x is None:
            x = self._read(i)
            if self.keep:
                self.kept[i] = x
        return {"pixel_values": x, "labels": torch.tensor(self.labels[i])}


class Sentences(Rows):
    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        self.notes: list[str] = []
        pair = rows["pair"][:] if "pair" in rows.column_names else None
        coded = tokenizer(rows["text"][:], pair, truncation=max_length is not None,
                          max_length=max_length)
        cut = sum(bool(e.overflowing) for e in coded.encodings or ())
        if cut:
            self.notes.append(f"{cut} of {len(rows)} rows are longer than max_length={max_length} "
                              "tokens, and are read up to there")
        self.columns = {k: coded[k] for k in tokenizer.model_input_names if k in coded}
        self.labels = rows["label"][:]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, i: int) -> int:
        return len(self.columns["input_ids"][i])

    def row(self, i: int) -> dict[str, Any]:
        return {k: v[i] for k, v in self.columns.items()} | {"labels": self.labels[i]}


class Documents(Rows):
    """All documents end to end, a stop token after each, cut into rows of `length_` tokens.

    The last row is shorter, and is left out when it holds a single token (nothing to predict).
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int):
        stream: list[int] = []
        for text in rows["text"]:
            stream += tokenizer(text, add_special_tokens=False)["input_ids"]
            stream.append(tokenizer.eos_token_id)
        self.stream, self.size = torch.tensor(stream), max_length
        full, rest = divmod(len(stream), max_length)
        self.count = full + (rest > 1)
        if self.count == 0:
            raise DataError("the documents hold no two tokens together; nothing can be learnt")

    def __len__(self) -> int:
        return self.count

    def length(self, i: int) -> int:
        return min(self.size, len(self.stream) - i * self.size)

    def row(self, i: int) -> dict[str, Any]:
        ids = self.stream[i * self.size : (i + 1) * self.size]
        return {"input_ids": ids, "labels": ids}


class Turns(Rows):
    """Conversations, or prompts with completions; rows cut before anything learnt are left out."""

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None,
                 where: Callable[[int], str] | None):
        self.notes: list[str] = []
        self.tokens: list[chat.Tokens] = []
        self.sources: list[int] = []
        lost = cut = 0
        plain = "prompt" in rows.column_names
        for i, row in enumerate(rows):
            at = where(i) if where else f"row {i}"
            marked = (chat.mark_completion(tokenizer, row["prompt"], row["completion"]) if plain
                      else chat.mark(tokenizer, row["messages"], at))
            whole = chat.tokenize(tokenizer, marked, None, special=plain)
            tokens = chat.Tokens(whole.input_ids[:max_length], whole.labels[:max_length])
            if all(y == -100 for y in tokens.labels[1:]):
                lost += 1
            else:
                cut += len(tokens.labels) < len(whole.labels)
                self.tokens.append(tokens)
                self.sources.append(i)
        if lost:
            self.notes.append(f"{lost} of {len(rows)} rows are longer than max_length={max_length} "
                              "before the answer starts, and are left out")
        if cut:
            self.notes.append(f"{cut} of {len(rows)} rows are longer than max_length={max_length} "
                              "tokens: their answers are learnt up to there, without their stop")
        if not self.tokens:
            raise DataError(f"no row has an answer within max_length={max_length} tokens; raise it")

    def __len__(self) -> int:
        return len(self.tokens)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return len(self.tokens[i].input_ids)

    def row(self, i: int) -> dict[str, Any]:
        t = self.tokens[i]
        return {"input_ids": t.input_ids, "labels": t.labels}
