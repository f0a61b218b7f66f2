"""Tasks whose answers a decoder writes, behind what an encoder has seen or heard."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError, DataError
from ..writing import NOTHING, Pen, after_encoder, written
from .base import Batch, Task
from .language import per_word


class Told:
    """Rows (beside :class:`Kept`) with the tokens of a text, its end among them; texts longer than
    `most` tokens are left out. texts: as they stand; tokens: of those that stay."""

    notes: list[str]

    def told(self, texts: Sequence[str], tokens: Sequence[Sequence[int]], most: int | None) -> None:
        self.sources = [i for i, t in enumerate(tokens) if most is None or len(t) <= most]
        if lost := len(tokens) - len(self.sources):
            self.notes.append(f"{lost} of {len(tokens)} texts have more than the {most} tokens "
                              "that the model has places for, and are left out")
        if not self.sources:
            raise DataError(f"no text has {most} tokens or fewer; nothing can be learnt")
        self.texts, self.tokens = ([k[i] for i in self.sources] for k in (texts, tokens))

    def __len__(self) -> int:
        return len(self.sources)

    def source(self, i: int) -> int:
        return self.sources[i]

    @property
    def most(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.tokens))

    def beside(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with the longest texts, which may be of others."""
        texts = sorted(self.tokens, key=len, reverse=True)
        return [row | {"labels": t} for row, t in zip(rows, texts, strict=False)]


class Writer(Task):
    """``decoder_input_ids`` (B, P + S): the prompt and the text, ``labels`` (B, P + S): the text
    and its end, -100 under the prompt and behind the end, beside what the encoder takes.

    Figures are of what the model writes by itself, the likeliest token each time, up to
    `max_answer` tokens.
    """

    unlike = True
    smooths = False
    writes = True
    settings = ("max_answer",)
    #: what a model's forward must take
    takes_all = frozenset({"decoder_input_ids", "encoder_outputs", "labels"})

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    # -- the model -----------------------------------------------------------------------------
    def begin(self, model: nn.Module, prompt: Sequence[int], known: int | None, places: int | None,
              end: int | None = None) -> None:
        """How the model writes. known: its words; places: of its decoder; end: of a text, where the
        tokenizer does not say it.

        Raises ConfigError for a model without a decoder, and for a tokenizer that is not its own.
        """
        name, t = type(model).__name__, self.tokenizer
        takes = inspect.signature(model.forward).parameters
        if not self.takes_all <= set(takes):
            raise ConfigError(f"{name} has no decoder that reads the text so far; "
                              f"{self.data.task} is served for encoder-decoders")
        self.end = t.eos_token_id if end is None else end
        if self.end is None:
            raise ConfigError(f"{type(t).__name__} has no token that ends a text (eos_token), so "
                              "no answer would end")
        if known is not None and len(t) > known:
            raise ConfigError(f"the tokenizer writes {len(t)} tokens and {name} knows {known}: "
                              "they do not belong together")
        said = getattr(model, "generation_config", None)
        start = getattr(model.config, "decoder_start_token_id", None)
        start = getattr(said, "decoder_start_token_id", None) if start is None else start
        if not prompt and start is None:
            raise ConfigError(f"{name} does not say what its decoder begins with "
                              "(decoder_start_token_id)")
        self.prompt = list(prompt) or [start]
        self.room = None if places is None else places - len(self.prompt)
        self.never, self.first = (
            [i for i in getattr(said, k, None) or () if known is None or i < known]
            for k in ("suppress_tokens", "begin_suppress_tokens"))

    # -- the rows ------------------------------------------------------------------------------
    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with its end."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*found, self.end]

    def taught(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """What the decoder reads, and what it is to write."""
        read = [torch.tensor([*self.prompt, *r["labels"][:-1]]) for r in rows]
        told = [torch.tensor([*[NOTHING] * (len(self.prompt) - 1), *r["labels"]]) for r in rows]
        return {"decoder_input_ids": pad_sequence(read, batch_first=True, padding_value=self.end),
                "labels": pad_sequence(told, batch_first=True, padding_value=NOTHING)}

    # -- loss and figures ----------------------------------------------------------------------
    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(outputs).flatten(0, 1), labels.flatten())

    @property
    def longest(self) -> int:
        """Tokens that an answer of an evaluation may have."""
        if "max_answer" not in self.how:
            most = max(r.most for s in self.data.splits if isinstance(r := self.rows(s), Told))
            self.how["max_answer"] = most + most // 4 + 1
        return int(self.how["max_answer"])

    def write(self, model: Any, seen: Mapping[str, Any], most: int, longest: bool = False
              ) -> torch.Tensor:
        first = next(iter(seen.values()))
        start = torch.tensor([self.prompt], device=first.device).expand(len(first), -1)
        return written(model, seen, start, self.pen(most), longest)

    def pen(self, most: int) -> Pen:
        return Pen(most if self.room is None else min(most, self.room), self.end, self.never,
                   self.first, after=after_encoder)

    def looked(self, model: Any, batch: Any, outputs: Any, longest: bool = False
               ) -> tuple[Any, torch.Tensor]:
        losses = per_word(self.logits(outputs), batch["labels"])
        seen = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
        return self.write(model, seen, self.longest, longest), losses

    def told(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, :1]                            # figures are of the rows' texts

    def compared(self, said: list[str], right: list[str]) -> dict[str, float]:
        """Figures of texts, blanks brought to one between words."""
        raise NotImplementedError

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Any = None) -> dict[str, float]:
        assert isinstance(rows, Told)
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        said = [self.read(torch.as_tensor(a)) for a in answers]
        return {"loss": total / max(count, 1.0),
                **self.compared(said, [" ".join(t.split()) for t in rows.texts])}

    def read(self, tokens: torch.Tensor) -> str:
        ids = [i for i in tokens.tolist() if 0 <= i < len(self.tokenizer)]
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    # -- answers to people ---------------------------------------------------------------------
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        return {"text": self.read(self.write(model, self.encode(row), tokens)[0])}
