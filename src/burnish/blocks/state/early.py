"""A model run as far as one of its blocks: what comes after is never computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError


class _Enough(Exception):
    """The block has answered."""


def states(model: nn.Module, path: str, batch: Mapping[str, Any]) -> Tensor:
    """(B, T, D): what the module at `path` returns first, with its graph where one is built."""
    found: list[Any] = []

    def hook(module: Any, args: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)
        raise _Enough

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        model(**{k: v for k, v in batch.items() if k != "labels"})
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found or found[0].dim() != 3:
        raise ConfigError(f"{path} returns no states of samples and tokens in this model")
    return found[0]


def last_token(model: nn.Module, path: str, batch: Mapping[str, Any]) -> Tensor:
    """(B, D): the states of the last token that ``attention_mask`` counts, whichever side the
    padding is on."""
    h = states(model, path, batch)
    mask = batch.get("attention_mask")
    if mask is None:
        return h[:, -1]
    at = (torch.arange(mask.shape[1], device=mask.device) * mask.long()).argmax(1)
    return h[torch.arange(len(h), device=h.device), at.to(h.device)]
