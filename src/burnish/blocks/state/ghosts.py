"""Batch norms that look at a few samples at a time.

    y_g = gamma (x_g - mean(x_g)) / sqrt(var(x_g) + eps) + beta        for each run g of samples
    mean_run <- (1 - e) mean_run + e mean(x_g),   one run after the other; var_run likewise

Scale, shift and running statistics are shared. A last run of fewer samples moves the running
statistics by its share of e; one of a single sample joins the run before it where no channel would
have a second number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import Listener


class Ghosts(Listener):
    """Around a batch norm: in training, `batch` samples are normalised together."""

    what = "a ghost batch norm"
    changes = False                              # what evaluates, or is a file, has no batches

    def __init__(self, state: Any, adapter: str, batch: int):
        super().__init__(state, adapter)
        self.batch = batch

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        x, *rest = (*args, *kw.values())
        if not module.training or x.shape[0] <= self.batch:
            return call(x, *rest)
        parts = list(x.split(self.batch))
        if parts[-1][:, 0].numel() == 1:
            parts[-2:] = [x[len(x) - len(parts[-2]) - 1 :]]
        return torch.cat([self._run(module, call, part) for part in parts])

    def _run(self, module: Any, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        whole = module.momentum
        if whole is None:                        # a mean over all runs so far
            return call(x)
        try:
            module.momentum = whole * min(1.0, len(x) / self.batch)
            return call(x)
        finally:
            module.momentum = whole


def batch_norms(model: nn.Module) -> list[str]:
    """Paths of the batch norms whose batch is that of one process."""
    return [path for path, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            and not isinstance(m, nn.SyncBatchNorm)]
