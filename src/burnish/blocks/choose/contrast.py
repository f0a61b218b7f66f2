"""A loss on features, which asks no head: samples of one class close together, others apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.errors import DataError, RecipeError


def supervised_contrast(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``mean_i -1/|P(i)| sum_{p in P(i)} log (exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T))``

    z (n, d), rows taken to length one; P(i) the other samples of i's class; over the i that have
    any. DataError where none has.
    """
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    if not bool(alike.any()):
        raise DataError(f"a contrastive loss wants two samples of one class in a batch, and a "
                        f"batch of {len(z)} has none: calibrate with larger batches")
    log = (z @ z.t() / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    n = alike.sum(-1)
    return -(log.masked_fill(~alike, 0).sum(-1) / n.clamp(min=1))[n > 0].mean()


def features(model: nn.Module, batch: Any, run: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """(what enters the head (n, d), the class of each sample (n,)) of a batch.

    RecipeError where the model has no head that classifies whole samples.
    """
    anatomy, seen = Anatomy.of(model), list[Tensor]()
    if anatomy.head_kind != "classification":
        raise RecipeError("features of a class are what enters a head that classifies, and this "
                          "model has none; contrast=False reads the gradients of its own loss")
    head = model.get_submodule(anatomy.head[-1])
    first = next((m for m in head.modules() if isinstance(m, nn.Linear)), head)
    handle = first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        run(batch)
    finally:
        handle.remove()
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not seen or seen[-1].dim() != 2 or not isinstance(labels, Tensor) or labels.dim() != 1:
        raise RecipeError("this model's head does not give a class to each whole sample; "
                          "contrast=False reads the gradients of its own loss")
    return seen[-1], labels.to(seen[-1].device)
