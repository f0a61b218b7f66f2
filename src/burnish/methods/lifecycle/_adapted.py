"""What the methods that adapt a model while it answers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.batches import call, inputs
from ...core.errors import ConfigError
from ...core.method import Method
from ...core.outputs import vocabulary_head
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


class Read:
    """What a model hands its head, a row for each sample: of several tokens their mean over those
    that the attention mask counts. features: makes it of the outputs instead."""

    def __init__(self, who: str, tuned: Any, features: Callable[[Any], Tensor] | None = None):
        self.who, self.model, self.features = who, module_of(tuned), features
        self._last: Tensor | None = None
        if features is None:
            anatomy = anatomy_of(tuned)
            linears = [p.path for p in anatomy.places if anatomy.in_head(p) and p.kind == "linear"]
            path = vocabulary_head(anatomy) or next(reversed(linears), None)
            if path is None:
                raise ConfigError(f"{who}: this model has no linear head whose input could be the "
                                  "features; give features=lambda outputs: ...")
            self.head = self.model.get_submodule(path)

    def of(self, batch: Any) -> Tensor:
        """(B, width), of one forward."""
        if self.features is not None:
            return self.features(call(self.model, batch))
        hook = self.head.register_forward_pre_hook(self._seen)
        try:
            call(self.model, batch)
        finally:
            hook.remove()
        h, self._last = self._last, None
        if h is None:
            raise ConfigError(f"{self.who}: the head did not run, or not on a tensor; give "
                              "features=lambda outputs: ...")
        given = inputs(batch)
        mask = given.get("attention_mask") if isinstance(given, Mapping) else None
        if h.dim() == 3 and isinstance(mask, Tensor) and mask.shape == h.shape[:2]:
            weight = mask.to(h.dtype).unsqueeze(-1)
            return (h * weight).sum(1) / weight.sum(1).clamp_min(1)
        return h if h.dim() == 2 else h.flatten(1, -2).mean(1)

    def _seen(self, module: Any, args: tuple) -> None:
        self._last = args[0].detach() if args and isinstance(args[0], Tensor) else None
