"""A model without its weights: fake parameters of the same shapes, on any device.

A copy shares no storage with the model it was made from and reads none of it. A config becomes a
model on `meta` first (initialisers ask for values, which only a real or a meta tensor survives)
and is then given fake parameters.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.errors import ConfigError


def from_config(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The config's first architecture on the meta device, in training mode."""
    import transformers
    from transformers import initialization

    names = list(getattr(config, "architectures", None) or [])
    if names:
        cls = getattr(transformers, names[0], None)
        if cls is None:
            raise ConfigError(f"transformers {transformers.__version__} has no {names[0]} (first "
                              "of the config's architectures); pass the model itself on meta")
    elif type(config) in transformers.MODEL_MAPPING:
        cls = transformers.MODEL_MAPPING[type(config)]
    else:
        raise ConfigError(f"{type(config).__name__} names no architecture; set "
                          "config.architectures, e.g. ['ViTForImageClassification']")
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), safe():
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    return model.train()


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: str | torch.device,
              dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` whose tensors are fake, on `device`, in `dtype` where floating."""
    memo: dict[int, Any] = {}
    keep: list[Tensor] = []                   # ids stay valid while the copy is made
    with mode:
        for _, t in _tensors(model):
            if id(t) in memo:
                continue
            keep.append(t)
            kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
            fake = torch.empty_strided(t.shape, t.stride(), dtype=kind, device=device)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=t.requires_grad)
            memo[id(t)] = fake
    twin = copy.deepcopy(model, memo)
    del keep
    return twin


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    for path, module in model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                yield f"{path}.{name}" if path else name, t
        for name, t in vars(module).items():
            if isinstance(t, Tensor):
                yield f"{path}.{name}" if path else name, t


# -- batches ----------------------------------------------------------------------------------
#: default length of text where the batch names none
SEQUENCE = 512

_PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification",
               "ForVideoClassification", "ForMultipleChoice", "ForNextSentencePrediction")
_PER_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification",
              "ForConditionalGeneration", "ForPreTraining", "DoubleHeadsModel")


def shapes_of(model: nn.Module, batch: int | tuple[int, int]
              ) -> dict[str, tuple[tuple[int, ...], torch.dtype] | bool]:
    """Name -> (shape, dtype) of what the model's forward wants for `batch` samples.

    batch: number of samples, or (samples, tokens). Raises ConfigError where the model does not
    say what it takes; the batch is then given as a mapping of tensors.
    """
    samples, length = batch if isinstance(batch, tuple) else (batch, None)
    if samples < 1 or (length is not None and length < 1):
        raise ConfigError(f"batch {batch} is not positive; write for example 8 or (8, 512)")
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise ConfigError(f"{type(model).__name__} does not say what it takes; give the batch as "
                          "a mapping of tensors, e.g. {'x': torch.empty(8, 3, 224, 224)}")
    accepted = inspect.signature(model.forward).parameters
    out: dict[str, Any] = {}
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    if name == "input_ids" or "input_ids" in accepted:
        limit = getattr(text, "max_position_embeddings", None) or SEQUENCE
        length = length or min(SEQUENCE, limit)
        out["input_ids"] = (samples, length), torch.int64
    if name == "pixel_values" or "pixel_values" in accepted:
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(vision, "num_frames", None)
        shape = (samples, frames, channels, height, width) if frames \
            else (samples, channels, height, width)
        out["pixel_values"] = shape, torch.get_default_dtype()
    if name == "input_values":
        out[name] = (samples, length or 16000), torch.get_default_dtype()
    if name == "input_features":
        frames = length or 2 * getattr(config, "max_source_positions", 1500)
        out[name] = (samples, getattr(config, "num_mel_bins", 80), frames), \
            torch.get_default_dtype()
    if not out:
        raise ConfigError(f"no rule for the input {name!r} of {type(model).__name__}; give the "
                          "batch as a mapping of tensors")
    out |= _labels(type(model).__name__, config, accepted, samples, length, out)
    return out


def _labels(cls: str, config: Any, accepted: Any, samples: int, length: int | None,
            inputs: dict[str, Any]) -> dict[str, Any]:
    whole = torch.int64
    if "return_loss" in accepted and "labels" not in accepted:
        return {"return_loss": True}
    if "start_positions" in accepted:
        return {"start_positions": ((samples,), whole), "end_positions": ((samples,), whole)}
    if "labels" not in accepted:
        return {}
    if cls.endswith(_PER_SAMPLE):
        kind = torch.get_default_dtype() if getattr(config, "num_labels", 2) == 1 else whole
        return {"labels": ((samples,), kind)}
    if cls.endswith("ForSemanticSegmentation"):
        return {"labels": ((samples, *inputs["pixel_values"][0][-2:]), whole)}
    if cls.endswith(_PER_TOKEN) and length:
        return {"labels": ((samples, length), whole)}
    return {}
