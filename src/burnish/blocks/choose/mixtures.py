"""Which shares of several data sets do best, told from a few mixtures that were tried.

    y(w) = m + sum_i b_i w_i + sum_{i<j} b_ij w_i w_j         w: shares, sum 1

fitted by ridge regression on centred terms; its strength is the one of a grid whose figures, each
foretold by the others (leave one out), are nearest:

    e_n = r_n / (1 - H_nn),    H = 1/N + X (X^T X + l I)^-1 X^T,  X (N, P) centred, r = y - H y

Everything in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError

#: strengths that are tried, per mixture
GRID = tuple(10.0**k for k in range(-9, 2))


def drawn(sources: int, count: int, seed: int) -> Tensor:
    """(count, sources) shares: all alike, each source alone, then any with the same chance."""
    g = torch.Generator().manual_seed(seed)
    first = torch.cat([torch.full((1, sources), 1 / sources, dtype=torch.float64),
                       torch.eye(sources, dtype=torch.float64)])
    more = -torch.rand(max(count, 1), sources, generator=g, dtype=torch.float64).clamp_min(
        1e-300).log()
    return torch.cat([first, more / more.sum(1, keepdim=True)])[:count]


def terms(w: Tensor, degree: int) -> Tensor:
    """(N, S) -> (N, S), or with the S (S - 1) / 2 products of two of them behind."""
    if degree == 1:
        return w
    i, j = torch.triu_indices(w.shape[1], w.shape[1], offset=1, device=w.device)
    return torch.cat([w, w[:, i] * w[:, j]], 1)


@dataclass(frozen=True)
class Surface:
    """A fitted y(w). coefficients (P,), centre (P,), mean; error: root mean square of what the
    others foretell of each mixture tried; strength: the l that it was found with."""

    coefficients: Tensor
    centre: Tensor
    mean: float
    degree: int
    error: float
    strength: float

    def __call__(self, w: Tensor) -> Tensor:
        """(N, S) shares -> (N,)."""
        return self.mean + (terms(w.double(), self.degree) - self.centre) @ self.coefficients


def fitted(w: Tensor, y: Sequence[float] | Tensor, degree: int = 2) -> Surface:
    """Of mixtures w (N, S) and what each came to. ConfigError for fewer than 3, or for figures
    that are no numbers."""
    y = torch.as_tensor(y, dtype=torch.float64)
    if len(w) < 3 or len(w) != len(y):
        raise ConfigError("a figure is foretold from three mixtures or more, each with its own; "
                          f"got {len(w)} and {len(y)}")
    if not bool(y.isfinite().all()):
        raise ConfigError("the figure of a mixture is no number, so nothing can be foretold")
    X = terms(w.double(), degree)
    centre, mean, n = X.mean(0), float(y.mean()), len(w)
    X, found = X - centre, []
    for strength in GRID:
        ridge = n * strength
        K = torch.linalg.solve(X.t() @ X + ridge * torch.eye(X.shape[1], dtype=X.dtype), X.t())
        H = 1 / n + X @ K
        left = (y - H @ y) / (1 - H.diagonal()).clamp_min(1e-12)
        found.append((float(left.square().mean().sqrt()), strength, K @ (y - mean)))
    error, strength, coefficients = min(found, key=lambda f: f[0])
    return Surface(coefficients, centre, mean, degree, error, strength)


def best(surface: Surface, sources: int, seed: int, among: int = 20_000) -> Tensor:
    """(S,) the shares of which the surface foretells most, of so many drawn."""
    w = drawn(sources, among, seed)
    return w[int(surface(w).argmax())]
