"""What the methods that adapt a model while it answers have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method
from ...core.targets import tensors
from ..objective.distill import logits_of


class Adapts:
    """A method whose ``lifecycle(tuned)`` is the model as it answers a stream."""

    adapts: ClassVar[bool] = True


def module_of(tuned: Any) -> nn.Module:
    """The model: it, or that of what ``tune`` returned."""
    return tuned if isinstance(tuned, nn.Module) else tuned.model


def anatomy_of(tuned: Any) -> Anatomy:
    """Of the base: what a recipe has added is no part of it."""
    return Anatomy.of(tuned) if isinstance(tuned, nn.Module) else tuned.anatomy


def affines(method: Method, tuned: Any) -> dict[str, nn.Parameter]:
    """Scales and shifts of normalisation layers, by name; those that `targets` names."""
    anatomy, model = anatomy_of(tuned), module_of(tuned)
    found = {f"{path}.{leaf}" if path else leaf: p for path in anatomy.norms
             for leaf, p in model.get_submodule(path).named_parameters(recurse=False)}
    names = list(found) if method.targets is None else \
        tensors(anatomy, method.targets, found, siblings=True)
    if not names:
        raise ConfigError(f"{method.name} moves the scales and shifts of norms, and this model has "
                          f"none{' there' if found else ''}; lame needs no weight")
    return {n: found[n] for n in names}


def untargeted(method: Method, why: str) -> None:
    """ConfigError where `targets` are given that nothing reads."""
    if method.targets is not None:
        raise ConfigError(f"{method.name or type(method).__name__.lower()}: "
                          f"targets={method.targets!r} does nothing: {why}")


def class_logits(outputs: Any, who: str) -> Tensor:
    """(B, K) logits in fp32 or wider."""
    found = logits_of(outputs, who)
    if found.dim() != 2 or found.shape[-1] < 2:
        raise ConfigError(f"{who} reads one row of logits a sample over two classes or more, and "
                          f"these are {list(found.shape)}")
    return found.to(torch.promote_types(found.dtype, torch.float32))
