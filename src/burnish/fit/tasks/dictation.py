"""What is said in a recording, written by a decoder: Whisper and its kin."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError, DataError
from ..alphabet import Spoken
from ..from_files import Sounds
from ..rows import Rows
from ..words import words_of
from ..writing import NOTHING, Pen, after_encoder, written
from .base import Batch
from .heard import Heard
from .language import per_word

#: a first token of prompts, as Whisper's tokenizer knows it
_BEGIN = "<|startoftranscript|>"


class Dictated(Sounds):
    """Recordings with the tokens of what is said in them; texts longer than `most` tokens are left
    out. texts: as they stand."""

    def __init__(self, rows: Any, tokens: Sequence[Sequence[int]], most: int | None, *how: Any):
        super().__init__(rows, tokens, *how)
        self.sources = [i for i, t in enumerate(tokens) if most is None or len(t) <= most]
        if lost := len(rows) - len(self.sources):
            self.notes.append(f"{lost} of {len(rows)} texts have more than the {most} tokens that "
                              "the model has places for, and are left out")
        if not self.sources:
            raise DataError(f"no text has {most} tokens or fewer; nothing can be learnt")
        self.texts = [rows["text"][i] for i in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return self.samples[self.sources[i]]

    def row(self, i: int) -> dict[str, Any]:
        return super().row(self.sources[i])

    @property
    def most(self) -> int:
        """Tokens of the longest text."""
        return max(len(self.labels[i]) for i in self.sources)

    def longest(self, count: int) -> list[dict[str, Any]]:
        """The longest sounds beside the longest texts, which may be of other rows."""
        texts = sorted(self.sources, key=lambda i: -len(self.labels[i]))
        return [row | {"labels": self.labels[i]}
                for row, i in zip(super().longest(count), texts[:count], strict=True)]


class SpeechToText(Heard):
    """The model's input as :class:`Heard` has it; ``decoder_input_ids`` (B, P + S): the prompt and
    the text, ``labels`` (B, P + S): the text and its end, -100 under the prompt and behind the end.

    The prompt is the tokenizer's (the language and whether it is transcribed or translated, as
    `language` and `translate` say, without times), or the token that the model's decoder begins
    with. Figures are of what the model writes by itself, the likeliest token each time, up to
    `max_answer` tokens.
    """

    metric = "wer"
    greater_is_better = False
    smooths = False
    writes = True
    settings = (*Heard.settings, "language", "translate", "max_answer")

    def prepare(self) -> None:
        p = self.processor
        if hasattr(p, "feature_extractor") and hasattr(p, "tokenizer"):    # transformers' own pair
            p = self.processor = Spoken(p.feature_extractor, p.tokenizer)
        if not isinstance(p, Spoken) or p.tokenizer is None:
            raise ConfigError("speech is written down with the model's tokenizer, and there is "
                              "none; give processor= with the folder of a model that has one")
        super().prepare()
        t = p.tokenizer
        if t.eos_token_id is None:
            raise ConfigError(f"{type(t).__name__} has no token that ends a text (eos_token), so "
                              "no answer would end")
        language, translate = self.how.get("language"), self.how.get("translate")
        if hasattr(t, "set_prefix_tokens"):
            said = None if language is None and translate is None else (
                "translate" if translate else "transcribe")
            try:
                t.set_prefix_tokens(language, said, False)
            except ValueError:
                raise ConfigError(f"language={language!r} is none that {type(t).__name__} knows; "
                                  "give its English name or its code, such as 'german' or 'de'"
                                  ) from None
            self._prompt = list(t.prefix_tokens)
            names = t.convert_ids_to_tokens(self._prompt)
            if None in names or t.unk_token_id in self._prompt or (
                    language and names[1] not in (f"<|{c}|>" for c in _codes(language))):
                raise ConfigError(f"language={language!r}: the tokenizer lacks a token for it")
        elif language is not None or translate is not None:
            name = "translate" if language is None else "language"
            raise ConfigError(f"{name}={self.how[name]!r}: {type(t).__name__} begins with no "
                              "language; leave it out")
        else:
            self._prompt = []

    @property
    def extractor(self) -> Any:
        return self.processor.extractor if isinstance(self.processor, Spoken) else self.processor

    # -- the model -----------------------------------------------------------------------------
    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        name, t = type(model).__name__, self.processor.tokenizer
        takes = inspect.signature(model.forward).parameters
        if not {"decoder_input_ids", "encoder_outputs", "labels"} <= set(takes):
            raise ConfigError(f"{name} has no decoder that reads the text so far; speech to text "
                              "is served for encoder-decoders such as Whisper and Moonshine")
        config, said = model.config, getattr(model, "generation_config", None)
        known = words_of(model)
        if known is not None and len(t) > known:
            raise ConfigError(f"the tokenizer writes {len(t)} tokens and {name} knows {known}: "
                              "they do not belong together")
        if getattr(said, "is_multilingual", False) and self.how.get("language") is None:
            raise ConfigError(f"{name} writes many languages: language= says which is learnt, such "
                              "as 'english' or 'de'")
        if not self._prompt:
            start = getattr(config, "decoder_start_token_id", None)
            if start is None:
                raise ConfigError(f"{name} does not say what its decoder begins with "
                                  "(decoder_start_token_id)")
            self._prompt = [start]
        places = getattr(config, "max_target_positions", None) or getattr(
            config, "max_position_embeddings", None)
        self._room = None if places is None else places - len(self._prompt)
        self._never, self._first = (
            [i for i in getattr(said, k, None) or () if known is None or i < known]
            for k in ("suppress_tokens", "begin_suppress_tokens"))
        if said is not None and hasattr(t, "set_prefix_tokens") and self.how.get("language"):
            said.language, said.task = t.language, t.task        # what generate begins with, too
            said.forced_decoder_ids = None

    # -- the rows ------------------------------------------------------------------------------
    def tokens(self, text: str) -> list[int]:
        """Of a text, with its end; behind a prompt of Whisper's a word begins with a blank."""
        t = self.processor.tokenizer
        text = f" {text.strip()}" if _BEGIN in t.get_vocab() else text
        ids: list[int] = t(text, add_special_tokens=False)["input_ids"]
        return [*ids, t.eos_token_id]

    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        made = Dictated(rows, [self.tokens(x) for x in rows["text"]], self._room, self.extractor,
                        self.limit, self.data.where.get(split))
        self.hear(split, made)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        before = self._prompt
        read = [torch.tensor([*before, *r["labels"][:-1]]) for r in rows]
        told = [torch.tensor([*[NOTHING] * (len(before) - 1), *r["labels"]]) for r in rows]
        end = self.processor.tokenizer.eos_token_id
        return self.padded(rows) | {
            "decoder_input_ids": pad_sequence(read, batch_first=True, padding_value=end),
            "labels": pad_sequence(told, batch_first=True, padding_value=NOTHING)}

    # -- loss and figures ----------------------------------------------------------------------
    def pen(self, most: int) -> Pen:
        most = most if self._room is None else min(most, self._room)
        return Pen(most, self.processor.tokenizer.eos_token_id, self._never, self._first,
                   after=after_encoder)

    @property
    def longest(self) -> int:
        """Tokens that an answer of an evaluation may have."""
        if "max_answer" not in self.how:
            most = max(r.most for s in self.data.splits if isinstance(r := self.rows(s), Dictated))
            self.how["max_answer"] = most + most // 4 + 1
        return int(self.how["max_answer"])

    def write(self, model: Any, seen: Mapping[str, Any], most: int, longest: bool = False
              ) -> torch.Tensor:
        first = next(iter(seen.values()))
        start = torch.tensor([self._prompt], device=first.device).expand(len(first), -1)
        return written(model, seen, start, self.pen(most), longest)

    def looked(self, model: Any, batch: Any, outputs: Any, longest: bool = False
               ) -> tuple[Any, torch.Tensor]:
        losses = per_word(self.logits(outputs), batch["labels"])
        seen = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
        return self.write(model, seen, self.longest, longest), losses

    def told(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, :1]                            # figures are of the rows' texts

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """Words and characters to be changed, left out and put in, over those that are right."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        assert isinstance(rows, Dictated)
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        said = [self.read(torch.as_tensor(a)) for a in answers]
        right = [" ".join(t.split()) for t in rows.texts]
        return {"loss": total / max(count, 1.0), "wer": float(word_error_rate(said, right)),
                "cer": float(char_error_rate(said, right))}

    def read(self, tokens: torch.Tensor) -> str:
        ids = [i for i in tokens.tolist() if 0 <= i < len(self.processor.tokenizer)]
        return " ".join(self.processor.tokenizer.decode(ids, skip_special_tokens=True).split())

    # -- answers to people ---------------------------------------------------------------------
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        return {"text": self.read(self.write(model, self.encode(row), tokens)[0])}


def _codes(language: str) -> set[str]:
    """A language's codes, by its name or as it stands."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return {TO_LANGUAGE_CODE.get(language.lower(), language.lower()), language.lower()}
