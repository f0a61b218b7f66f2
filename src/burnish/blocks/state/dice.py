"""The Dice loss of masks, beside a model's own.

    mean_b (1 - (2 sum p y + 1) / (sum p + sum y + 1)),   p = sigmoid(logits), y in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import Listener, named


def dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Of logits and masks (B, H, W)."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().flatten(1)
    y = masks.to(p).flatten(1)
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


class Overlap(Listener):
    """Listens to a model that draws masks: `weight` times their Dice loss is in its loss too."""

    what = "a Dice loss"

    def __init__(self, state: Any, adapter: str, weight: float):
        super().__init__(state, adapter)
        self.weight = weight

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        masks = named(module, args, kw).get("labels")
        out = call(*args, **kw)
        if masks is None or isinstance(out, tuple):
            return out
        out["loss"] = out["loss"] + self.weight * dice(out["logits"], masks).to(out["loss"].dtype)
        return out
