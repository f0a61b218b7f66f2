"""Which samples of a batch are alike, and answers that agree where they are.

    E = sum_i KL(z_i || q_i) - (lambda / 2) sum_ij w_ij z_i . z_j       z_i on the simplex

has, with its concave part made linear at z, the minimum ``softmax(log(q + 1e-10) + lambda W z)``,
which is the next z. For a symmetric positive W every such step goes down; for others it need not.
What tells that nothing moves any more is, as released,

    E' = sum (z log z - log q . z - lambda (W z) . z)

without the half, which may rise on its way.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["knn", "rbf", "linear"]
KINDS = ("knn", "rbf", "linear")


def affinity(features: Tensor, kind: Kind, neighbours: int = 5, symmetrise: bool = False) -> Tensor:
    """(B, D) -> W (B, B), of features of length 1, in fp32 or wider.

    knn: 1 for the nearest others by Euclidean distance, row by row (as many as there are where they
    are fewer). rbf: ``exp(-d^2 / 2 sigma^2)``, sigma the mean distance to the nearest, the sample
    itself counted among them. linear: F F^T. symmetrise: ``(W + W^T) / 2``.
    """
    f = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    if kind == "linear":
        return f @ f.t()
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    if kind == "rbf":
        far = distance.topk(min(neighbours, len(f)), largest=False).values[:, -1].mean()
        W = torch.exp(-distance.square() / (2 * far.square().clamp(min=torch.finfo(f.dtype).tiny)))
        return W.fill_diagonal_(1.0)
    distance.fill_diagonal_(torch.inf)
    nearest = distance.argsort(dim=1, stable=True)[:, :min(neighbours, len(f) - 1)]
    W = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
    return (W + W.t()) / 2 if symmetrise else W


def energy(z: Tensor, q: Tensor, W: Tensor, strength: float) -> float:
    """E' of z (B, K)."""
    return float((torch.xlogy(z, z) - z * _log(q) - strength * (W @ z) * z).sum())


def agreeing(q: Tensor, W: Tensor, strength: float, *, tolerance: float = 1e-8, most: int = 100
             ) -> tuple[Tensor, list[float]]:
    """(log z, E' after every step): steps from z = q until E' moves by no more than `tolerance` of
    itself (looked at from the third step on), or `most` of them."""
    z, seen = q, []
    for i in range(most):
        said = F.log_softmax(_log(q) + strength * (W @ z), -1)
        z = said.exp()
        seen.append(energy(z, q, W, strength))
        if i > 1 and abs(seen[-1] - seen[-2]) <= tolerance * abs(seen[-2]):
            break
    return said, seen


def _log(q: Tensor) -> Tensor:
    return torch.log(q + 1e-10)
