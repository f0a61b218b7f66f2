"""The k lowest of many, exactly: one selection for whoever prunes and whoever keeps."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def lowest(score: Tensor, k: int) -> Tensor:
    """Truth values: the k lowest of each run of the last dimension, of equal ones those that come
    first, on every device alike. Asks for no count, so no device waits for it."""
    n = score.shape[-1]
    if k <= 0 or k >= n:
        return torch.full_like(score, k > 0, dtype=torch.bool)
    last = score.kthvalue(k, keepdim=True).values
    below, same = score < last, score == last
    left = k - below.sum(-1, keepdim=True)           # of the equal ones, so many are taken
    first = same.cumsum(-1, dtype=torch.int32) <= left
    return below.logical_or_(same.logical_and_(first))
