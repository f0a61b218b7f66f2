"""Views of one sample: what a model says of them, which of them it is sure of, what they agree on.

    H(p) = - sum_c p_c log p_c            of a view, from its logits
    agreed = H(mean of p over the kept views)

Everything in fp32 or wider, from logarithms: no logarithm of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError


def log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def entropies(logits: Tensor) -> Tensor:
    """(N, C) -> (N,)."""
    logp = log_probabilities(logits)
    return -(logp.exp() * logp).sum(-1)


def agreed(logits: Tensor) -> Tensor:
    """The entropy of the views' mean distribution, (N, C) -> ()."""
    logp = log_probabilities(logits)
    mean = torch.logsumexp(logp, 0) - torch.log(logp.new_tensor(len(logp)))
    return -(mean.exp() * mean).sum()


def sure(logits: Tensor, share: float) -> Tensor:
    """Indices of the ``max(1, floor(share N))`` views of least entropy, rising."""
    k = max(1, int(share * len(logits) + 1e-9))
    return entropies(logits.detach()).argsort(stable=True)[:k].sort().values


def alike(features: Tensor, made: int, share: float) -> Tensor:
    """Which of N views may stay (N,): all but the last `made`, and of those the share whose
    features are nearest to the first view's, by their cosine."""
    stays = torch.ones(len(features), dtype=torch.bool, device=features.device)
    if made:
        f = F.normalize(features.detach().float(), dim=-1)
        near = (f[-made:] @ f[0]).argsort(descending=True, stable=True)
        stays[len(f) - made + near[max(1, int(share * made + 1e-9)):]] = False
    return stays


def rows_of(batch: Mapping[str, Any], over: Sequence[str] | None) -> tuple[tuple[str, ...], int]:
    """(the keys that have a row for each view, how many): `over`, else ``pixel_values``, else the
    only tensor there is."""
    tensors = [k for k, v in batch.items() if isinstance(v, Tensor) and v.dim()]
    found = tuple(over) if over is not None else \
        ("pixel_values",) if "pixel_values" in batch else tuple(tensors[:1] * (len(tensors) == 1))
    sizes = {len(batch[k]) for k in found if k in tensors}
    if len(sizes) != 1 or not set(found) <= set(tensors):
        raise ConfigError(f"which of {', '.join(map(str, batch))} has a row for each view cannot "
                          "be told: say over=[...], keys of tensors of one length")
    return found, sizes.pop()


def some(batch: Mapping[str, Any], over: Sequence[str], index: Tensor) -> dict[str, Any]:
    """The batch with these views alone."""
    return {k: v[index.to(v.device)] if k in over else v for k, v in batch.items()}
