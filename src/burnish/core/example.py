"""A batch a model would accept, made from its config alone.

The sizes come from the config, so the same call serves a toy and ViT-B/16, and it may run inside
``FakeTensorMode`` or under ``torch.device("meta")``: nothing here looks at a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import denoisers, families
from .architecture import architecture
from .draw import drawn
from .errors import ConfigError

#: tokens of text where neither the batch nor the model says how many
SEQUENCE = 512

_PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification",
               "ForVideoClassification", "ForMultipleChoice", "ForNextSentencePrediction")
_PER_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification",
              "ForConditionalGeneration", "ForPreTraining", "DoubleHeadsModel")


def example_batch(model: nn.Module | Any, batch: int | tuple[int, int] | Mapping[str, Any] = 2,
                  seed: int = 0) -> dict[str, Any]:
    """Named inputs with labels, so that ``model(**batch).loss`` is a scalar.

    model: a transformers model or config, or a module with its own ``example(samples)``.
    batch: samples, or (samples, tokens); a mapping is returned as it is (as a dict).
    seed: of the values; the global random state stays as it was.

    Text is filled with ids in [1, vocabulary), without padding; a language model with image
    tokens gets text alone; a denoiser of diffusers has no labels. Raises ConfigError for a model
    that does not say what it takes.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    samples, tokens = (batch, None) if isinstance(batch, int) else _pair(batch)
    if samples < 1 or (tokens is not None and tokens < 1):
        raise ConfigError(f"batch {batch!r} is not positive; write for example 8 or (8, 512)")
    draw = _Draw(seed)
    own = getattr(model, "example", None)
    if callable(own) and not hasattr(model, "config"):
        return dict(own(samples))
    if denoisers.is_denoiser(model):
        return denoisers.inputs(model, samples, draw)       # type: ignore[arg-type]
    config = getattr(model, "config", model)
    cls = type(model).__name__ if isinstance(model, nn.Module) else _architecture(config)
    out = _inputs(config, samples, tokens, draw)
    if not out:
        raise ConfigError(f"{type(model).__name__} does not say what it takes; give the batch as "
                          "a mapping of tensors, e.g. {'x': torch.empty(8, 3, 224, 224)}")
    return out | _labels(config, cls, out, samples, tokens, draw)


class _Draw:
    """Seeded values on whatever device or mode is current."""

    def __init__(self, seed: int):
        self.seed = seed

    def ids(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return self._run(lambda: torch.randint(low, max(high, low + 1), shape))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return self._run(lambda: torch.randn(shape))

    def _run(self, make: Any) -> Tensor:
        with drawn(self.seed):
            self.seed += 1
            return make()


def _pair(batch: Any) -> tuple[int, int]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2
            and all(isinstance(n, int) for n in batch)):
        raise ConfigError(f"batch {batch!r}: expected samples, (samples, tokens) or a mapping of "
                          "tensors")
    return batch[0], batch[1]


def _architecture(config: Any) -> str:
    """The class a config stands for; "" for what is no transformers config."""
    return (getattr(config, "architectures", None) or [""])[0] or (
        architecture(config).__name__ if hasattr(config, "model_type") else "")


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, None) or config


def _inputs(config: Any, samples: int, tokens: int | None, draw: _Draw) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if _tells(config):                                      # its decoder reads the labels
        return _inputs(config.encoder, samples, tokens, draw)
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    if (sound := _sound(config, tokens)) is not None:
        return {sound[0]: draw.normal((samples, *sound[1]))}
    if getattr(text, "vocab_size", None) is not None:
        out["input_ids"] = draw.ids((samples, _length(text, tokens)), 1, text.vocab_size)
    size = getattr(vision, "image_size", None)
    if size is None and getattr(vision, "num_channels", None) is not None:
        size = 224                                          # a fully convolutional network
    if size is not None and not (out and _image_token(config)):
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        frames = getattr(vision, "num_frames", None)
        shape = (*([frames] if frames else []), getattr(vision, "num_channels", 3), height, width)
        out["pixel_values"] = draw.normal((samples, *shape))
    return out


def _sound(config: Any, tokens: int | None) -> tuple[str, tuple[int, ...]] | None:
    """Input name and shape of one sample: mel frames, spectrograms, or a second at 16 kHz."""
    mels = getattr(config, "num_mel_bins", None)
    if mels is not None and hasattr(config, "frequency_stride"):
        return "input_values", (config.max_length, mels)
    if mels is not None:                                    # two frames per position
        return "input_features", (mels, 2 * getattr(config, "max_source_positions", 1500))
    if hasattr(config, "conv_stride") and hasattr(config, "num_feat_extract_layers"):
        return "input_values", (tokens or 16000,)
    return None


def _tells(config: Any) -> bool:
    """An encoder of pictures with a decoder of text, each with a config of its own."""
    return getattr(config, "model_type", None) == "vision-encoder-decoder"


def _image_token(config: Any) -> bool:
    return any(getattr(config, n, None) is not None
               for n in ("image_token_index", "image_token_id"))


def _length(text: Any, tokens: int | None) -> int:
    limit = getattr(text, "max_position_embeddings", None)
    if limit and getattr(text, "model_type", "") in families.OFFSET_POSITIONS:
        limit -= (text.pad_token_id or 0) + 1
    return tokens or min(SEQUENCE, limit or SEQUENCE)


def _labels(config: Any, cls: str, inputs: dict[str, Any], samples: int, tokens: int | None,
            draw: _Draw) -> dict[str, Any]:
    classes = getattr(config, "num_labels", 2)
    if "input_ids" in inputs and "pixel_values" in inputs and not cls.endswith(_PER_TOKEN):
        return {"return_loss": True}                        # contrastive
    if cls.endswith("ForQuestionAnswering"):
        length = inputs["input_ids"].shape[1]
        return {k: draw.ids((samples,), 0, length) for k in ("start_positions", "end_positions")}
    if cls.endswith(_PER_SAMPLE):
        if classes == 1:
            return {"labels": draw.normal((samples,))}
        return {"labels": draw.ids((samples,), 0, classes)}
    if cls.endswith("ForSemanticSegmentation"):
        return {"labels": draw.ids((samples, *inputs["pixel_values"].shape[-2:]), 0, classes)}
    if cls.endswith("ForTokenClassification"):
        return {"labels": draw.ids(tuple(inputs["input_ids"].shape), 0, classes)}
    if _tells(config):
        length = tokens or min(SEQUENCE, getattr(config.decoder, "max_position_embeddings", None)
                               or SEQUENCE)
        return {"labels": draw.ids((samples, length), 1, config.decoder.vocab_size)}
    if cls.endswith(_PER_TOKEN):
        text = _part(config, "text_config")
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else \
            tokens or min(SEQUENCE, getattr(config, "max_target_positions", None) or SEQUENCE)
        return {"labels": draw.ids((samples, length), 1, text.vocab_size)}
    return {}
