"""What is on a picture, written by a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError
from ..captioned import Captions, pair
from ..rows import Rows
from ..writing import NOTHING, Pen, after_picture, seen_once
from .base import Batch
from .language import per_word
from .writer import Told, Writer


@dataclass(frozen=True)
class Form:
    """Where a kind of model says what it reads and writes. encoder, decoder: parts of its config
    ("": the config itself). begin, end: what there stands for the token before a text and behind
    it ("": as the tokenizer and the config say). takes: what its forward must take."""

    encoder: str
    decoder: str
    begin: str = ""
    end: str = ""
    takes: frozenset[str] = frozenset({"pixel_values", "input_ids", "labels"})


FORMS = {"vision-encoder-decoder": Form("encoder", "decoder", takes=Writer.takes_all),
         "blip": Form("vision_config", "text_config", "bos_token_id", "sep_token_id"),
         "git": Form("vision_config", "", "bos_token_id", "eos_token_id")}


class Pictured(Told, Captions):
    """Pictures with the tokens of what is on them."""

    def __init__(self, rows: Any, processor: Any, tokens: Sequence[Sequence[int]],
                 most: int | None, where: Any):
        super().__init__(rows, processor, tokens, where)
        self.notes = []
        self.told(rows["text"][:], tokens, most)

    def length(self, i: int) -> int:
        return len(self.tokens[i])

    def row(self, i: int) -> dict[str, Any]:
        made = super().row(self.sources[i])
        return {"pixel_values": made["pixel_values"], "labels": self.tokens[i]}


class ImageCaptioning(Writer):
    """``pixel_values`` (B, C, H, W), and what :class:`Writer` makes of the text; the decoder begins
    with the token that the model's config names. BLIP and GIT take a text and its prompt as
    ``input_ids`` (B, P + S), and ``labels`` of the same places."""

    metric = "rouge_l"
    greater_is_better = True
    takes = ("image",)

    def prepare(self) -> None:
        self.processor = pair(self.processor, self.data.task)
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length}: texts are as long as they are, up to "
                              "the places of the decoder; max_answer= says how much is written")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        form = self.form = FORMS.get(getattr(config, "model_type", ""))
        if form is None or config is None:
            raise ConfigError(f"{type(model).__name__} has no decoder beside an encoder of "
                              "pictures; captions are served for vision encoder-decoders, BLIP and "
                              "GIT")
        encoder = getattr(config, form.encoder)
        text = getattr(config, form.decoder) if form.decoder else config
        side, made = getattr(encoder, "image_size", None), self.processor.picture
        if isinstance(side, int) and (made.height, made.width) != (side, side):
            raise ConfigError(f"{type(model).__name__} reads pictures of {side} x {side}, and its "
                              f"processor makes them {made.width} x {made.height}; give the "
                              "processor= that belongs to the model")
        self.takes_all = form.takes
        self.begin(model, [getattr(text, form.begin)] if form.begin else (), text.vocab_size,
                   getattr(text, "max_position_embeddings", None),
                   getattr(text, form.end) if form.end else None)
        self.patches = model.git.encoder.layer[0].attention.self.image_patch_tokens \
            if config.model_type == "git" else 0

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        made = Pictured(rows, self.processor, [self.ids(x) for x in rows["text"]], self.room,
                        self.data.where.get(split))
        self.notes += [f"{split}: {n}" for n in made.notes]
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows])} | self.taught(rows)

    def taught(self, rows: Sequence[dict[str, Any]]) -> Batch:
        if self.ids_name == "decoder_input_ids":
            return super().taught(rows)
        begun = len(self.prompt)                         # the model itself looks one token ahead
        read = [torch.tensor([*self.prompt, *r["labels"]]) for r in rows]
        told = [torch.tensor([*[NOTHING] * begun, *r["labels"]]) for r in rows]
        return {"input_ids": pad_sequence(read, batch_first=True, padding_value=self.end),
                "labels": pad_sequence(told, batch_first=True, padding_value=NOTHING)}

    # -- the model's text ----------------------------------------------------------------------
    @property
    def ids_name(self) -> str:
        return "input_ids" if "input_ids" in self.takes_all else "decoder_input_ids"

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return super().loss(*self.met(outputs, labels), smoothing)

    def looked(self, model: Any, batch: Any, outputs: Any, longest: bool = False
               ) -> tuple[Any, torch.Tensor]:
        losses = per_word(*self.met(outputs, batch["labels"]))
        seen = {"pixel_values": batch["pixel_values"]}
        return self.write(model, seen, self.longest, longest), losses

    def met(self, outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and the token that each is to tell."""
        logits = self.logits(outputs)
        if self.ids_name == "decoder_input_ids":
            return logits, labels
        return logits[:, self.patches:-1], labels[:, 1:]

    def write(self, model: Any, seen: Mapping[str, Any], most: int, longest: bool = False
              ) -> torch.Tensor:
        kind = getattr(model.config, "model_type", "")
        with seen_once(model.vision_model) if kind == "blip" else nullcontext():
            return super().write(model, seen, most, longest)

    def pen(self, most: int) -> Pen:
        made = super().pen(most)
        if self.patches:
            return replace(made, ids="input_ids",
                           after=partial(after_picture, begun=len(self.prompt)))
        return replace(made, ids="input_ids", after=_again, states=_both) \
            if self.ids_name == "input_ids" else made

    def compared(self, said: list[str], right: list[str]) -> dict[str, float]:
        """Texts that are right as a whole, and the mean of :func:`rouge_l`."""
        same = [a == b for a, b in zip(said, right, strict=True)]
        near = [rouge_l(a, b) for a, b in zip(said, right, strict=True)]
        return {"rouge_l": sum(near) / len(near), "exact_match": sum(same) / len(same)}

    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed({"pixel_values": self.processor.picture(row["image"])[None]})


def _both() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _again(out: Any, seen: Mapping[str, Any]) -> Mapping[str, Any]:
    return seen


def rouge_l(said: str, right: str) -> float:
    """ROUGE-L (Lin, 2004): twice the words of the longest common subsequence over all words of the
    two texts, in small letters."""
    a, b = said.lower().split(), right.lower().split()
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[-1], before[j + 1]))
    return 2 * row[-1] / (len(a) + len(b))
