"""Pictures of what a text says: a denoiser that reads what text encoders make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.reading import plain
from ..conditions import Conditions, checked
from ..rows import Rows
from .base import Batch
from .diffusion import Beside, Clean, ImageGeneration

#: what the sampler calls that of which a denoiser is told
CALLED = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds",
          "pooled_projections": "pooled_prompt_embeds"}
#: what SDXL is told in a mapping of its own
ADDED = ("text_embeds", "time_ids")


class TextToImage(ImageGeneration):
    """As :class:`ImageGeneration`, and what the pipeline's own encoders make of each text:
    ``encoder_hidden_states`` (B, T, D), of SD3 ``pooled_projections`` (B, P), of SDXL
    ``text_embeds`` (B, P) and ``time_ids`` (B, 6): (height, width) of the picture as it was, top
    and left of the cut, (height, width) of what is learnt.

    With proportion_empty_prompts = p a text is left out with probability p in training (Ho and
    Salimans, 2022); the model is told then what the pipeline's guidance tells it.
    """

    takes = ("text",)
    settings = (*ImageGeneration.settings, "instance_prompt", "proportion_empty_prompts",
                "resolution", "guidance_scale")
    drawing = (*ImageGeneration.drawing, "guidance_scale")
    exact = (*ImageGeneration.exact, "time_ids")

    def prepare(self) -> None:
        super().prepare()
        prompt = self.how.get("instance_prompt")
        if prompt is not None and not prompt.strip():
            raise ConfigError("instance_prompt is empty; say what the pictures show")
        for name, rows in self.data.splits.items():
            if "text" in rows.column_names:
                if prompt is not None:
                    raise ConfigError(f"instance_prompt={plain(prompt, 60)!r} is of pictures "
                                      "without texts, and the data has a text for each; leave it "
                                      "out")
            elif prompt is None:
                raise ConfigError(
                    f"{self.data.task} reads a text for each picture, and the {name} split has "
                    "none: a column text, caption or prompt of metadata.csv or metadata.jsonl, a "
                    ".txt beside each picture, or instance_prompt='a photo of sks dog' for all")

    def settle(self, model: nn.Module) -> None:
        checked(model, self.processor.kind)
        super().settle(model)
        most = model.config.get("pos_embed_max_size")          # type: ignore[union-attr, operator]
        cells = self.reads_pictures.height // self.processor.cell // int(
            model.config.get("patch_size") or 1)               # type: ignore[union-attr, operator]
        if most is not None and cells > most:
            raise ConfigError(f"resolution={self.reads_pictures.height}: {type(model).__name__} "
                              f"has places for {most} x {most} patches, which would be {cells} x "
                              f"{cells}")
        self.conditions = Conditions(self.processor, self.reads)

    # -- the rows ------------------------------------------------------------------------------
    def texts(self, rows: Any) -> list[str]:
        if "text" in rows.column_names:
            return list(rows["text"][:])
        return [self.how["instance_prompt"]] * len(rows)

    def make(self, split: str) -> Rows:
        texts = self.texts(self.data.splits[split])
        self.conditions.ask([*texts, ""])            # guidance asks for nothing, in samples too
        self.notes += self.conditions.notes(texts, f"texts of the {split} split")
        return super().make(split)

    def beside(self, rows: Any, clean: Clean) -> Beside:
        texts, told = self.texts(rows), self.conditions.known
        left_out = self.how.get("proportion_empty_prompts") or 0.0
        sized = "text_embeds" in self.conditions.names
        sizes = [self.sizes(clean.sizes[i]) for i in range(len(texts))] if sized else []

        def of(i: int, g: torch.Generator | None) -> dict[str, Tensor]:
            gone = g is not None and left_out and float(torch.rand((), generator=g)) < left_out
            return told["" if gone else texts[i]] | ({"time_ids": sizes[i]} if sized else {})

        return of

    def sizes(self, was: tuple[int, int]) -> Tensor:
        """A picture's ``time_ids`` as the picture was cut (:class:`burnish.fit.pictures.Picture`).
        """
        made = self.reads_pictures
        goal = min(made.height, made.width) / min(was)
        height, width = (max(side, round(w * goal)) for side, w in zip(
            (made.height, made.width), was, strict=True))
        return torch.tensor([*was, (height - made.height) // 2, (width - made.width) // 2,
                             made.height, made.width], dtype=torch.float32)

    def feed(self, batch: Batch) -> Batch:
        given: dict[str, Any] = super().feed(batch)
        added = {k: given.pop(k) for k in ADDED if k in given}
        return given | ({"added_cond_kwargs": added} if added else {})

    # -- answers to people ---------------------------------------------------------------------
    def posed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": row.get("text") or self.how["instance_prompt"]}

    def asked(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str, int]:
        text = str(row["text"])
        self.conditions.ask(["", text])
        told, nothing = self.conditions.known[text], self.conditions.known[""]
        how: dict[str, Any] = {"height": self.reads_pictures.height,
                               "width": self.reads_pictures.width}
        for name, value in told.items():
            how[CALLED[name]] = value[None]
            how[f"negative_{CALLED[name]}"] = nothing[name][None]
        if self.how.get("guidance_scale") is not None:
            how["guidance_scale"] = self.how["guidance_scale"]
        return how, text, self.seed

    def drawn(self, model: nn.Module, how: Mapping[str, Any], seed: int) -> Any:
        where = next(model.parameters())
        return super().drawn(model, {k: v.to(where) if isinstance(v, Tensor) else v
                                     for k, v in how.items()}, seed)
