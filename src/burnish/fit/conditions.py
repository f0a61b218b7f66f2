"""What a pipeline of diffusers makes of texts before it draws: asked once, and let go."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.reading import plain, reading
from .pipelines import READS, Pipeline, numbers

#: texts that the encoders read at once
AT_ONCE = 16

Told = dict[str, Tensor]


class Conditions:
    """text -> what the denoiser is told of it, each text once, on the host in the numbers of the
    model (`reads`). "" is what it is told where it is told nothing, as the pipeline's guidance
    has it.

    cut: texts that a tokenizer has read up to its longest only, with that length.
    """

    def __init__(self, pipeline: Pipeline, reads: torch.dtype | None = None):
        self.pipeline, self.reads = pipeline, reads
        self.names = READS[pipeline.kind]
        self.known: dict[str, Told] = {}
        self.cut: dict[str, int] = {}

    def of(self, text: str) -> Told:
        self.ask([text])
        return self.known[text]

    def ask(self, texts: Iterable[str]) -> None:
        """Loads the encoders and asks them of those texts that they were not yet asked of."""
        new = [t for t in dict.fromkeys(texts) if t not in self.known]
        if not new:
            return
        pipe = self._pipe()
        for start in range(0, len(new), AT_ONCE):
            some = new[start:start + AT_ONCE]
            self._look(pipe, some)
            for text, told in zip(some, self._encoded(pipe, some), strict=True):
                self.known[text] = told

    def _pipe(self) -> Any:
        """The pipeline with its encoders alone: of the denoiser its shape, of the coder nothing."""
        with torch.device("meta"):
            shape = self.pipeline.blank(self.pipeline.part)
        left = {p: None for p in ("vae", "scheduler", "safety_checker", "feature_extractor",
                                  "image_encoder") if p in self.pipeline.parts}
        pipe = self.pipeline.made(**numbers(self.reads), **left, **{self.pipeline.part: shape})
        for part in self._encoders():
            encoder = getattr(pipe, part).eval().requires_grad_(False)
            if torch.cuda.is_available():
                encoder.cuda()
        return pipe

    def _encoders(self) -> list[str]:
        return [p for p in self.pipeline.parts if p.startswith("text_encoder")]

    @torch.no_grad()
    def _encoded(self, pipe: Any, texts: Sequence[str]) -> list[Told]:
        device = next(getattr(pipe, self._encoders()[0]).parameters()).device
        takes = inspect.signature(pipe.encode_prompt).parameters
        how: dict[str, Any] = {n: None for n in ("prompt_2", "prompt_3") if n in takes}
        with reading(f"the text encoders of {self.pipeline.folder}", ConfigError):
            made = pipe.encode_prompt(
                prompt=list(texts), device=device, num_images_per_prompt=1,
                do_classifier_free_guidance=True, **how)
        # (told, told of nothing) of each name
        pairs = list(zip(self.names, made[0::2], made[1::2], strict=True))
        return [{name: (nothing if text == "" else told)[i].to("cpu", self.reads or told.dtype)
                 .clone() for name, told, nothing in pairs} for i, text in enumerate(texts)]

    def _look(self, pipe: Any, texts: Sequence[str]) -> None:
        """Which texts are longer than a tokenizer reads."""
        for part in self.pipeline.parts:
            if not part.startswith("tokenizer"):
                continue
            tokenizer = getattr(pipe, part)
            if "T5" in type(tokenizer).__name__:              # read up to another length, by SD3
                most = inspect.signature(pipe.encode_prompt).parameters[
                    "max_sequence_length"].default
            else:
                most = tokenizer.model_max_length
            for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
                if len(ids) > most:
                    self.cut[text] = min(most, self.cut.get(text, most))

    def notes(self, texts: Sequence[str], what: str) -> list[str]:
        """A note on those of these texts that are read in part."""
        some = [t for t in texts if t in self.cut]
        if not some:
            return []
        return [f"{len(some)} of {len(texts)} {what} are longer than the "
                f"{self.cut[some[0]]} tokens that the pipeline reads, and are read up to there, "
                f"such as {plain(some[0], 60)!r}"]


def checked(denoiser: nn.Module, kind: str) -> None:
    """Raises ConfigError for a denoiser that is told more than `kind` of pipeline tells it."""
    config: Any = denoiser.config
    name = type(denoiser).__name__
    if kind == "StableDiffusion3Pipeline":
        return
    known = {"addition_embed_type": "text_time" if kind == "StableDiffusionXLPipeline" else None,
             "encoder_hid_dim_type": None, "time_cond_proj_dim": None, "class_embed_type": None,
             "num_class_embeds": None}
    for key, wanted in known.items():
        if (found := config.get(key)) != wanted:
            raise ConfigError(f"{name} has {key}={plain(found, 40)!r}, and a {kind} tells it what "
                              f"goes with {key}={wanted!r}; fit serves those")
