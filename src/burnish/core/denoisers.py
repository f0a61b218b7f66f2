"""What a denoiser of diffusers is called with, by its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

#: tokens of a text that it is told, and steps of the schedule
TOKENS, STEPS = 77, 1000
#: numbers that say how large a picture was, where it is cut and how large it is
SIZES = 6


def is_denoiser(model: Any) -> bool:
    """Takes it noisy pictures and the step they are at?"""
    config = getattr(model, "config", None)
    return isinstance(model, nn.Module) and isinstance(config, Mapping) \
        and {"sample_size", "in_channels"} <= set(config) \
        and "timestep" in inspect.signature(model.forward).parameters


def part_of(model: nn.Module) -> str:
    """What pipelines call it."""
    return "unet" if type(model).__name__.startswith("UNet") else "transformer"


def inputs(model: nn.Module, samples: int, draw: Any) -> dict[str, Any]:
    """Noisy pictures and steps, with a text, its pooled states, sizes and classes where the
    model is told such. draw: ``normal(shape)`` and ``ids(shape, low, high)``."""
    config: Any = model.config
    side = config["sample_size"] or 64
    height, width = (side, side) if isinstance(side, int) else side
    first = next(iter(inspect.signature(model.forward).parameters))
    out: dict[str, Any] = {first: draw.normal((samples, config["in_channels"], height, width)),
                           "timestep": draw.ids((samples,), 0, STEPS)}
    wide = config.get("joint_attention_dim") or config.get("encoder_hid_dim") \
        or config.get("cross_attention_dim")
    if wide is not None and "encoder_hidden_states" in inspect.signature(model.forward).parameters:
        wide = wide if isinstance(wide, int) else wide[0]
        out["encoder_hidden_states"] = draw.normal((samples, TOKENS, wide))
    if (pooled := config.get("pooled_projection_dim")) is not None:
        out["pooled_projections"] = draw.normal((samples, pooled))
    if config.get("addition_embed_type") == "text_time":
        sizes = SIZES * config["addition_time_embed_dim"]
        rest = config["projection_class_embeddings_input_dim"] - sizes
        out["added_cond_kwargs"] = {"text_embeds": draw.normal((samples, rest)),
                                    "time_ids": draw.normal((samples, SIZES))}
    classes = config.get("num_class_embeds") or (
        config.get("num_embeds_ada_norm") if config.get("norm_type") == "ada_norm_zero" else None)
    if classes is not None:
        out["class_labels"] = draw.ids((samples,), 0, classes)
    return out
