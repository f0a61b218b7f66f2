"""Directions in hidden states: from contrasts of two sets of texts, and apart from each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from .taps import evaluating

#: a batch the model is called with, `labels` other than -100 at the tokens of the response
Batch = Mapping[str, Any]


def first(out: Any) -> Tensor:
    """The state among what a block returns."""
    return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def states(model: nn.Module, path: str, batch: Batch) -> Tensor:
    """(B, T, D): what the module at `path` returns for a batch, in evaluation mode."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: seen.append(first(out).detach()))
    try:
        with evaluating(list(model.modules())):
            model(**{k: v for k, v in batch.items() if k != "labels"})
    finally:
        hook.remove()
    if not seen:
        raise ConfigError(f"the model never runs {path}, so nothing can be read there")
    return seen[0]


def responses(h_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """(B, D): each response's mean state, over the tokens whose label is not -100."""
    told = (labels_BT != -100).to(h_BTD.device)
    if told.shape != h_BTD.shape[:2]:
        raise ConfigError(f"labels of shape {tuple(told.shape)} say nothing of states of shape "
                          f"{tuple(h_BTD.shape)}: one label per token is expected")
    if not bool(told.any(1).all()):
        raise ConfigError("a row has no token of a response: its labels are all -100")
    wide = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32))
    return (wide * told.unsqueeze(-1)).sum(1) / told.sum(1, keepdim=True)


def contrast(model: nn.Module, path: str, pairs: Iterable[tuple[Batch, Batch]]) -> Tensor:
    """(D,): ``mean h(high) - mean h(low)`` behind `path`, each response weighing the same."""
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for pair in pairs:
        for side, batch in enumerate(pair):
            found = responses(states(model, path, batch), batch["labels"])
            sums[side] = sums[side].to(found) + found.sum(0)
            counts[side] += len(found)
    if not all(counts):
        raise ConfigError("there are no pairs, so no direction between them")
    return sums[0] / counts[0] - sums[1] / counts[1]


def purified(v: Tensor, against: Iterable[Tensor]) -> Tensor:
    """`v` without its part along the directions in `against`: ``v - (v . c) c``, c of length one,
    orthogonal to all of them where there are several."""
    base: list[Tensor] = []
    for c in against:
        for b in base:
            c = c - (c @ b) * b
        if float(c.norm()) > 1e-12:
            base.append(c / c.norm())
    for _ in range(2):                                   # twice: rounding of the first is gone
        for b in base:
            v = v - (v @ b) * b
    return v
