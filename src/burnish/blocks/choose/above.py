"""The k largest of values that are met part by part, by one exact threshold over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .quantile import SAMPLE, order_statistics


def threshold(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The value above which, strictly, k of all values (not negative) lie; fewer where some are
    equal to it. -1 where there are no more than k."""
    n = sum(p.numel() for p in parts())
    if k >= n:
        return -1.0
    like = next(p for p in parts() if p.numel())

    def sample() -> Tensor:
        found, step = [], max(1, n // SAMPLE)
        for p in parts():
            found.append(p.flatten()[::step])
        return torch.cat(found)

    return float(order_statistics(parts, n, n - k - 1, sample, like)[0])
