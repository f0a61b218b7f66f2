"""A head that never trains: the vertices of a simplex, as far from each other as classes can be.

    M = sqrt(K / (K - 1)) U (I_K - 1 1^T / K)         U (width, K) with orthonormal columns

Its columns have length 1 and each two of them the cosine -1 / (K - 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError


def simplex(width: int, classes: int, generator: torch.Generator) -> Tensor:
    """M (width, classes), float32; ConfigError where width is below the number of classes."""
    if classes < 2 or width < classes:
        raise ConfigError(f"{classes} directions as far apart as can be take a width of at least "
                          f"as many and two classes or more, got a width of {width}")
    U, _ = torch.linalg.qr(torch.randn(width, classes, generator=generator, dtype=torch.float64))
    centred = torch.eye(classes, dtype=U.dtype) - 1 / classes
    return ((classes / (classes - 1))**0.5 * U @ centred).float()


def aligned(features: Tensor, M: Tensor) -> Tensor:
    """Cosines (rows, classes) of features with the vertices, float32 or wider."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide, dim=-1) @ M.to(wide)


def dot_regression(cosines: Tensor, labels: Tensor) -> Tensor:
    """``(1 - m_y . f / |f|)^2 / 2``, a number a row."""
    return (1 - cosines.gather(1, labels.unsqueeze(1)).squeeze(1)).square() / 2
