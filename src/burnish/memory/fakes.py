"""A model without its weights: fake parameters of the same shapes, on any device.

A copy shares no storage with the model it was made from and reads none of it. A config becomes a
model on `meta` first (initialisers ask for values, which only a real or a meta tensor survives)
and is then given fake parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.errors import ConfigError
from ..core.example import example_batch


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


def blank_batch(model: nn.Module, batch: int | tuple[int, int], dtype: torch.dtype | None
                ) -> dict[str, Any]:
    """What the model takes for `batch` samples: floats on meta, integers real and all ones."""
    with torch.device("meta"):
        made = example_batch(model, batch)
    return {k: _blank(v, dtype) if isinstance(v, Tensor) else v for k, v in made.items()}


def _blank(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    if t.is_floating_point():
        return t if dtype is None else t.to(dtype)
    return torch.ones(t.shape, dtype=t.dtype)
