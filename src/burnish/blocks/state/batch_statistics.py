"""Batch norms that normalise by a mix of what they remember and what they are given.

    mu = a mu_s + (1 - a) mu_t             s2 = a s2_s + (1 - a) s2_t
    y = gamma (x - mu) / sqrt(s2 + eps) + beta

mu_s, s2_s are running statistics, mu_t, s2_t those of the batch (the biased variance), over samples
and places, and a gradient goes through them. The norm itself runs as it is, in evaluation mode, on

    x' = mu_s + (x - mu) sqrt((s2_s + eps) / (s2 + eps))

so whatever else stands at it goes on standing there, and its buffers are only read. In fp32 or
wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ..update.rules import accumulator


def remembering(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms with running statistics, by path."""
    return {path: m for path, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None}


@contextmanager
def mixed_statistics(model: nn.Module, alpha: float) -> Iterator[None]:
    """Inside, batch norms in evaluation mode take `alpha` of what they remember; 1 is the model."""
    hooks = [] if alpha == 1 else [
        m.register_forward_pre_hook(_Mix(path, alpha), with_kwargs=True)
        for path, m in remembering(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Mix:
    def __init__(self, path: str, alpha: float):
        self.path, self.alpha = path, alpha

    def __call__(self, norm: Any, args: tuple, kw: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self.shifted(norm, args[0]), *args[1:]), kw
        (name, x), *rest = kw.items()
        return (), {name: self.shifted(norm, x), **dict(rest)}

    def shifted(self, norm: Any, x: Tensor) -> Tensor:
        rest = [d for d in range(x.dim()) if d != 1]
        if not self.alpha and x.numel() == x.shape[1]:
            raise ConfigError(f"{self.path} sees one value a channel, which has no variance: give "
                              "more samples at once, or an alpha above 0")
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        wide = x.to(accumulator(x.dtype))
        s2, mu = torch.var_mean(wide, rest, correction=0)
        mu_s, s2_s = norm.running_mean.to(wide.dtype), norm.running_var.to(wide.dtype)
        a = self.alpha
        mu, s2 = a * mu_s + (1 - a) * mu, a * s2_s + (1 - a) * s2
        scale = ((s2_s + norm.eps) / (s2 + norm.eps)).sqrt()
        return (mu_s.view(shape) + (wide - mu.view(shape)) * scale.view(shape)).to(x.dtype)
