"""What is said in a recording, written by a decoder: Whisper and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core.errors import ConfigError
from ..alphabet import Spoken
from ..from_files import Sounds
from ..rows import Rows
from ..words import words_of
from .base import Batch
from .heard import Heard
from .writer import Told, Writer

#: a first token of prompts, as Whisper's tokenizer knows it
_BEGIN = "<|startoftranscript|>"


class Dictated(Told, Sounds):
    """Recordings with the tokens of what is said in them."""

    def __init__(self, rows: Any, tokens: Sequence[Sequence[int]], most: int | None, *how: Any):
        super().__init__(rows, tokens, *how)
        self.told(rows["text"][:], tokens, most)

    def length(self, i: int) -> int:
        return self.samples[self.sources[i]]

    def row(self, i: int) -> dict[str, Any]:
        return super().row(self.sources[i])

    def longest(self, count: int) -> list[dict[str, Any]]:
        """The longest sounds beside the longest texts, which may be of other rows."""
        return self.beside(super().longest(count))


class SpeechToText(Writer, Heard):
    """The model's input as :class:`Heard` has it, and what :class:`Writer` makes of the text.

    The prompt is the tokenizer's (the language and whether it is transcribed or translated, as
    `language` and `translate` say, without times), or the token that the model's decoder begins
    with.
    """

    metric = "wer"
    greater_is_better = False
    settings = (*Heard.settings, *Writer.settings, "language", "translate")

    def prepare(self) -> None:
        p = self.processor
        if hasattr(p, "feature_extractor") and hasattr(p, "tokenizer"):    # transformers' own pair
            p = self.processor = Spoken(p.feature_extractor, p.tokenizer)
        if not isinstance(p, Spoken) or p.tokenizer is None:
            raise ConfigError("speech is written down with the model's tokenizer, and there is "
                              "none; give processor= with the folder of a model that has one")
        super().prepare()
        t = p.tokenizer
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
        name, t, config = type(model).__name__, self.tokenizer, getattr(model, "config", None)
        said = getattr(model, "generation_config", None)
        if getattr(said, "is_multilingual", False) and self.how.get("language") is None:
            raise ConfigError(f"{name} writes many languages: language= says which is learnt, such "
                              "as 'english' or 'de'")
        places = getattr(config, "max_target_positions", None) or getattr(
            config, "max_position_embeddings", None)
        self.begin(model, self._prompt, words_of(model), places)
        if said is not None and hasattr(t, "set_prefix_tokens") and self.how.get("language"):
            said.language, said.task = t.language, t.task        # what generate begins with, too
            said.forced_decoder_ids = None

    # -- the rows ------------------------------------------------------------------------------
    def ids(self, text: str) -> list[int]:
        """Behind a prompt of Whisper's a word begins with a blank."""
        whispers = _BEGIN in self.tokenizer.get_vocab()
        return super().ids(f" {text.strip()}" if whispers else text)

    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        made = Dictated(rows, [self.ids(x) for x in rows["text"]], self.room, self.extractor,
                        self.limit, self.data.where.get(split))
        self.hear(split, made)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.padded(rows) | self.taught(rows)

    def compared(self, said: list[str], right: list[str]) -> dict[str, float]:
        """Words and characters to be changed, left out and put in, over those that are right."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        return {"wer": float(word_error_rate(said, right)),
                "cer": float(char_error_rate(said, right))}


def _codes(language: str) -> set[str]:
    """A language's codes, by its name or as it stands."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return {TO_LANGUAGE_CODE.get(language.lower(), language.lower()), language.lower()}
