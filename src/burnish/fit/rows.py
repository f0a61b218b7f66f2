"""Rows as tensors, made when they are asked for and kept where they are small.

Nothing here draws from a random generator, so that a row is the same in a run that was resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Dataset

from ..core.errors import DataError
from . import chat, tools


class Rows(Dataset):
    """A torch data set that knows how long each row is (all alike unless it says otherwise).

    context: keys that the recipe reads beside the row, an entry per row of the data.
    """

    context: Mapping[str, Sequence[int]] = MappingProxyType({})
    #: whether a later pass over the rows makes other tensors of them: row i of pass k is asked for
    #: as ``i + k * len(rows)``
    redrawn = False

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.row(i)
        return row if not self.context else \
            row | {k: v[self.source(i % len(self))] for k, v in self.context.items()}

    def row(self, i: int) -> dict[str, Any]:
        raise NotImplementedError

    def source(self, i: int) -> int:
        """The row of the data that row i was made of."""
        return i

    def length(self, i: int) -> int:
        return 1

    def longest(self, count: int) -> list[dict[str, Any]]:
        """As many rows as no batch of so many is longer than."""
        return [self[i] for i in sorted(range(len(self)), key=self.length, reverse=True)[:count]]


def cut(coded: Any, max_length: int | None, what: str = "rows") -> list[str]:
    """A note on the rows that a tokenizer read only up to `max_length` tokens."""
    many = sum(bool(e.overflowing) for e in coded.encodings or ())
    return [f"{many} of {len(coded['input_ids'])} {what} are longer than max_length={max_length} "
            "tokens, and are read up to there"] if many else []


class Sentences(Rows):
    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        self.notes: list[str] = []
        pair = rows["pair"][:] if "pair" in rows.column_names else None
        coded = tokenizer(rows["text"][:], pair, truncation=max_length is not None,
                          max_length=max_length)
        self.notes += cut(coded, max_length)
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


class OneByOne(Rows):
    """Documents each by itself: the first row that `make` cuts of it. One that holds nothing to
    learn is left out."""

    def __init__(self, rows: Any, make: Callable[[Any], Rows]):
        self.firsts: dict[int, dict[str, Any]] = {}
        for i in range(len(rows)):
            with contextlib.suppress(DataError):
                self.firsts[i] = make(rows.select([i]))[0]
        self.sources = list(self.firsts)
        if not self.sources:
            raise DataError("no document holds what can be learnt by itself")

    def __len__(self) -> int:
        return len(self.sources)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return len(self.row(i)["input_ids"])

    def row(self, i: int) -> dict[str, Any]:
        return self.firsts[self.sources[i]]


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
                      else chat.mark(tokenizer, row["messages"], at, tools.of(row)))
            whole = chat.tokenize(tokenizer, marked, None, special=plain)
            tokens = chat.Tokens(whole.input_ids[:max_length], whole.labels[:max_length])
            if all(y == -100 for y in tokens.labels[1:]):
                lost += 1
            else:
                cut += len(tokens.labels) < len(whole.labels)
                self.tokens.append(tokens)
                self.sources.append(i)
        said = [] if plain else [r for r in rows if chat.instructed(r["messages"])]
        if said and chat.refuses_system(tokenizer):
            self.notes.append(f"{len(said)} of {len(rows)} rows begin with a system turn, which "
                              "the tokenizer's chat template refuses: it opens the first user turn")
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


class Tagged(Rows):
    """Words with a tag each: a word's tag is its first token's."""

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        coded = tokenizer(rows["tokens"][:], is_split_into_words=True,
                          truncation=max_length is not None, max_length=max_length)
        self.notes = cut(coded, max_length)
        self.columns = {k: coded[k] for k in tokenizer.model_input_names if k in coded}
        self.labels = []
        for i, tags in enumerate(rows["tags"]):
            words = coded.word_ids(i)
            self.labels.append([-100 if w is None or w == before else tags[w]
                                for w, before in zip(words, [None, *words], strict=False)])

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, i: int) -> int:
        return len(self.labels[i])

    def row(self, i: int) -> dict[str, Any]:
        return {k: v[i] for k, v in self.columns.items()} | {"labels": self.labels[i]}


class Choices(Rows):
    """Pairs of answers to one prompt, the better one first.

    reference: (rows, 2), what the base would have said of each, log-probabilities summed over the
    answer; zeros until somebody has asked it.
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None,
                 where: Callable[[int], str] | None):
        plain = "prompt" in rows.column_names
        self.notes: list[str] = []
        self.tokens: list[tuple[chat.Tokens, chat.Tokens]] = []
        self.sources: list[int] = []
        lost = 0
        for i, row in enumerate(rows):
            at, pair = where(i) if where else f"row {i}", []
            for k in ("chosen", "rejected"):
                marked = chat.mark_completion(tokenizer, row["prompt"], row[k]) if plain else \
                    chat.last(chat.mark(tokenizer, row[k], at, tools.of(row)))
                pair.append(chat.tokenize(tokenizer, marked, max_length, special=plain))
            if any(all(y == -100 for y in t.labels[1:]) for t in pair):
                lost += 1
                continue
            self.tokens.append((pair[0], pair[1]))
            self.sources.append(i)
        if lost:
            self.notes.append(f"{lost} of {len(rows)} rows are longer than max_length={max_length} "
                              "before an answer starts, and are left out")
        if not self.tokens:
            raise DataError(f"no row has both answers within max_length={max_length} tokens; raise "
                            "it")
        self.reference: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return max(len(t.input_ids) for t in self.tokens[i])

    def row(self, i: int) -> dict[str, Any]:
        said = [0.0, 0.0] if self.reference is None else self.reference[i].tolist()
        return {"pair": self.tokens[i], "reference": said}


class Neighbours(Rows):
    """Texts that belong together: two, a third that does not, or a number of how near two are."""

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        self.notes: list[str] = []
        self.coded = []
        for name in ("text", "pair", "negative"):
            if name in rows.column_names:
                coded = tokenizer(rows[name][:], truncation=max_length is not None,
                                  max_length=max_length)
                self.notes += cut(coded, max_length, f"texts ({name})")
                self.coded.append(coded["input_ids"])
        self.scores = rows["label"][:] if "label" in rows.column_names else None

    def __len__(self) -> int:
        return len(self.coded[0])

    def length(self, i: int) -> int:
        return max(len(c[i]) for c in self.coded)

    def row(self, i: int) -> dict[str, Any]:
        return {"texts": [c[i] for c in self.coded],
                "labels": 1.0 if self.scores is None else self.scores[i]}


class Answers(Rows):
    """Prompts to be read and answers to be written, both up to `max_length` tokens."""

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        how = {"truncation": max_length is not None, "max_length": max_length}
        coded = tokenizer(rows["prompt"][:], **how)
        answers = tokenizer(text_target=rows["completion"][:], **how)
        self.notes = cut(coded, max_length, "prompts") + cut(answers, max_length, "answers")
        self.columns = {k: coded[k] for k in tokenizer.model_input_names if k in coded}
        self.labels = answers["input_ids"]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, i: int) -> int:
        return len(self.columns["input_ids"][i]) + len(self.labels[i])

    def longest(self, count: int) -> list[dict[str, Any]]:
        """The longest prompts beside the longest answers, which may be of other rows."""
        prompts = sorted(range(len(self)), key=lambda i: -len(self.columns["input_ids"][i]))
        answers = sorted(range(len(self)), key=lambda i: -len(self.labels[i]))
        return [{**self[a], "labels": self.labels[b]}
                for a, b in zip(prompts[:count], answers[:count], strict=True)]

    def row(self, i: int) -> dict[str, Any]:
        return {k: v[i] for k, v in self.columns.items()} | {"labels": self.labels[i]}


class Windows(Rows):
    """Questions with windows of their contexts, and where in each the answer begins and ends.

    question: the question's number, per window.  places: token -> (start, stop) in the context, of
    the context's own tokens.  right: texts that answer a question.  silent: whether some question
    has none.
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int,
                 where: Callable[[int], str] | None = None):
        self.contexts = rows["context"][:]
        self.right = [a["text"] for a in rows["answers"]]
        self.silent = not all(self.right)
        room = self._room(rows["question"][:], tokenizer, max_length, where)
        coded = tokenizer(rows["question"][:], self.contexts, truncation="only_second",
                          max_length=max_length, stride=min(max_length // 3, room - 1),
                          return_overflowing_tokens=True, return_offsets_mapping=True)
        self.question = coded["overflow_to_sample_mapping"]
        self.columns = {k: coded[k] for k in tokenizer.model_input_names if k in coded}
        self.places: list[dict[int, tuple[int, int]]] = []
        self.ends: list[tuple[int, int]] = []
        for i, which in enumerate(self.question):
            places = {t: span for t, (span, part) in enumerate(zip(
                coded["offset_mapping"][i], coded.sequence_ids(i), strict=True)) if part == 1}
            self.places.append(places)
            self.ends.append(self._ends(places, rows["answers"][which]))
        lost = len(self.right) - len({q for q, e in zip(self.question, self.ends, strict=True)
                                      if e != (0, 0)} | {q for q, r in enumerate(self.right)
                                                         if not r})
        self.notes = [f"{lost} of {len(self.right)} answers lie in no window of "
                      f"max_length={max_length} tokens, and are not learnt"] if lost else []

    @staticmethod
    def _room(questions: Sequence[str], tokenizer: Any, max_length: int,
              where: Callable[[int], str] | None) -> int:
        """Tokens of a context that stand beside the longest question."""
        asked = tokenizer(questions, add_special_tokens=False)["input_ids"]
        marks = tokenizer.num_special_tokens_to_add(pair=True)
        longest = max(range(len(asked)), key=lambda i: len(asked[i]))
        room = max_length - len(asked[longest]) - marks
        if room < 2:
            at = where(longest) if where else f"row {longest}"
            raise DataError(f"{at}: the question has {len(asked[longest])} tokens, which leave no "
                            f"room for a context in max_length={max_length}")
        return room

    def _ends(self, places: dict[int, tuple[int, int]], answers: dict[str, Any]) -> tuple[int, int]:
        """The first and last token of the first answer, where the window holds it whole."""
        if not answers["text"] or not places:
            return 0, 0
        start = answers["answer_start"][0]
        stop = start + len(answers["text"][0])
        if min(a for a, _ in places.values()) > start or max(b for _, b in places.values()) < stop:
            return 0, 0
        inside = [t for t, (a, b) in places.items() if b > start and a < stop]
        return (inside[0], inside[-1]) if inside else (0, 0)

    def __len__(self) -> int:
        return len(self.question)

    def source(self, i: int) -> int:
        return self.question[i]

    def text(self, i: int) -> str:
        return self.contexts[self.question[i]]

    def length(self, i: int) -> int:
        return len(self.columns["input_ids"][i])

    def row(self, i: int) -> dict[str, Any]:
        begin, end = self.ends[i]
        return {k: v[i] for k, v in self.columns.items()} | {"start_positions": begin,
                                                             "end_positions": end}


class Gaps(Rows):
    """All documents end to end in rows of `size` tokens, the tokenizer's own at both ends, with
    words to be told.

    again: each pass over the rows hides others: row i of pass k is asked for as ``i + k *
    len(rows)``. What is hidden is a function of seed, pass and row.
    """

    #: share of tokens to be told, and of those the share that is hidden and that becomes another
    TOLD, HIDDEN, OTHER = 0.15, 0.8, 0.1

    def __init__(self, rows: Any, tokenizer: Any, size: int, seed: int, again: bool):
        before, behind = _edges(tokenizer, rows["text"])
        ends = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else \
            tokenizer.eos_token_id
        stream: list[int] = []
        for text in rows["text"]:
            stream += tokenizer(text, add_special_tokens=False)["input_ids"]
            stream += [ends] if ends is not None else []
        room = max(1, size - len(before) - len(behind))
        self.ids = [[*before, *stream[k:k + room], *behind] for k in range(0, len(stream), room)]
        self.mask, self.words = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.seed, self.redrawn = seed, again
        if not any(len(set(ids) - set(tokenizer.all_special_ids)) for ids in self.ids):
            raise DataError("the documents hold no word; nothing can be learnt")

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, i: int) -> int:
        return len(self.ids[i % len(self)])

    def row(self, i: int) -> dict[str, Any]:
        turn, i = divmod(i, len(self))
        mixed = (self.seed * 1_000_003 + turn) * 1_000_003 + i
        g = torch.Generator().manual_seed(mixed % 2**63)
        ids = torch.tensor(self.ids[i])
        free = ~torch.isin(ids, self.special)
        told = free & (torch.rand(ids.shape, generator=g) < self.TOLD)
        if not told.any() and free.any():               # a short row is asked one word at least
            told[free.nonzero()[torch.randint(int(free.sum()), (1,), generator=g)]] = True
        how = torch.rand(ids.shape, generator=g)
        other = torch.randint(self.words, ids.shape, generator=g)
        labels = torch.where(told, ids, -100)
        ids = torch.where(told & (how < self.HIDDEN), self.mask, ids)
        ids = torch.where(told & (how >= 1 - self.OTHER), other, ids)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids),
                "labels": labels.tolist()}


def _edges(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and behind a text."""
    for text in texts:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        at = next((k for k in range(len(whole)) if whole[k:k + len(bare)] == bare), None)
        if bare and at is not None:
            return whole[:at], whole[at + len(bare):]
    return [], []
