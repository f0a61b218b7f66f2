"""What the methods that adapt a model while it answers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.taps import evaluating
from ...core.anatomy import Anatomy
from ...core.batches import call, inputs
from ...core.errors import ConfigError, DataError
from ...core.method import Method
from ...core.outputs import vocabulary_head
from ...core.targets import tensors
from ..objective.distill import logits_of


class Adapts:
    """A method whose ``lifecycle(tuned)`` is the model as it answers a stream.

    learns: it is ``lifecycle(tuned, source)``, which learns of labelled batches of source data
    first, the model as it is."""

    adapts: ClassVar[bool] = True
    learns: ClassVar[bool] = False


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


def linear_head(who: str, tuned: Any, other: str = "") -> nn.Module:
    """The last linear of the head of a model that classifies."""
    anatomy = anatomy_of(tuned)
    linears = [p.path for p in anatomy.places if anatomy.in_head(p) and p.kind == "linear"]
    if not linears or anatomy.head_kind != "classification":
        raise ConfigError(f"{who}: this model has no linear head whose input could be the "
                          f"features{other}")
    return module_of(tuned).get_submodule(linears[-1])


def labels_of(who: str, batch: Any) -> tuple[Tensor, Any]:
    """(labels (B,), what else is in a batch of source data)"""
    y = batch.get("labels") if isinstance(batch, Mapping) else \
        batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        raise DataError(f"{who}: source data are batches with labels, one class a sample: a "
                        "mapping with 'labels', or (inputs, labels)")
    return y, {k: v for k, v in batch.items() if k != "labels"} \
        if isinstance(batch, Mapping) else batch[0]


def in_classes(who: str, labels: Tensor, classes: int) -> None:
    """DataError where a label is no class of the head."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{who}: labels from {low} to {high} of a head with {classes} classes")


def labelled(who: str, model: nn.Module, head: nn.Module, batches: Iterable[Any]
             ) -> tuple[Tensor, Tensor, int]:
    """(what the head reads of the rows of labelled batches, (N, D); their labels (N,); how many
    classes it tells apart). The model answers in evaluation mode and is what it was."""
    seen: list[tuple[Tensor, Tensor]] = []
    features, labels, classes = [], [], 0

    def keep(module: Any, args: tuple, kw: dict[str, Any], out: Any) -> None:
        x = args[0] if args else next(iter(kw.values()), None)
        if isinstance(x, Tensor) and isinstance(out, Tensor):
            seen.append((x.detach(), out.detach()))

    hook = head.register_forward_hook(keep, with_kwargs=True)
    try:
        with evaluating([m for m in model.modules() if m.training]), torch.no_grad():
            for batch in batches:
                y, given = labels_of(who, batch)
                seen.clear()
                call(model, given)
                if not seen or seen[-1][0].dim() != 2 or len(seen[-1][0]) != len(y):
                    raise ConfigError(f"{who}: the head of this model does not read a row for "
                                      "each sample")
                classes = seen[-1][1].shape[-1]
                in_classes(who, y, classes)
                features.append(seen[-1][0])
                labels.append(y.to(seen[-1][0].device))
    finally:
        hook.remove()
    if not features:
        raise DataError(f"{who} learns of labelled source data, and there is no batch of them")
    return torch.cat(features), torch.cat(labels), classes


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


def stages_of(who: str, tuned: Any) -> list[nn.Module]:
    """The stages of a network of convolutions, in the order they run."""
    stacks = anatomy_of(tuned).stacks()
    paths = list(stacks)
    if len(stacks) == 1:
        (stack, blocks), = stacks.items()
        paths = list(dict.fromkeys(f"{stack}.{b.path[len(stack) + 1:].split('.')[0]}"
                                   for b in blocks))
    if len(paths) < 2:
        raise ConfigError(f"{who}: this model has no two stages of blocks to stand maps behind")
    return [module_of(tuned).get_submodule(path) for path in paths]
