"""Derivatives of activations in a few bits: tables of borders and levels.

    f'(x) ~ l_i  for  b_i < x <= b_{i+1},  i = 0 .. 2^k - 1

with borders and levels that minimise the integral of (f'(x) - l_i(x))^2. They are found by dynamic
programming over a grid (exact on the grid), once per activation and k. ReLU needs no table: one bit
is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

#: cells of the grid, and where it ends: a wider one would weigh the flat tails more
POINTS = 1600
_ENDS = {"gelu": 8.0, "gelu_tanh": 8.0, "silu": 16.0}


def _gelu(x: np.ndarray) -> np.ndarray:
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    return 0.5 * (1 + erf) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x ** 3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _silu(x: np.ndarray) -> np.ndarray:
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


DERIVATIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}


@lru_cache(maxsize=32)
def table(name: str, bits: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """(2^k - 1 borders, 2^k levels, the integrated squared error) of an activation's derivative.

    All of :data:`DERIVATIVES` have f'(x) + f'(-x) = 1, so one border is 0 and one half is the
    other's mirror.
    """
    edges = np.linspace(0.0, _ENDS[name], POINTS + 1)
    d = DERIVATIVES[name]((edges[:-1] + edges[1:]) / 2)
    one, two = (np.concatenate([[0.0], np.cumsum(v)]) for v in (d, d * d))
    n = np.arange(POINTS + 1)
    count = np.maximum(n[None, :] - n[:, None], 1)
    # cost[i, j]: squared error of one level over the cells i..j
    cost = (two[None, :] - two[:, None]) - (one[None, :] - one[:, None]) ** 2 / count
    cost[np.tril_indices(POINTS + 1)] = np.inf
    best, came = cost[0], []
    for _ in range(2 ** (bits - 1) - 1):
        total = best[:, None] + cost
        came.append(total.argmin(0))
        best = total.min(0)
    cut = [POINTS]
    for back in reversed(came):
        cut.append(int(back[cut[-1]]))
    cut = [0, *reversed(cut)]
    above = [float((one[b] - one[a]) / (b - a)) for a, b in zip(cut[:-1], cut[1:], strict=True)]
    borders = [float(edges[c]) for c in cut[1:-1]]
    return ((*(-b for b in reversed(borders)), 0.0, *borders),
            (*(1 - v for v in reversed(above)), *above),
            float(2 * best[POINTS] * (edges[1] - edges[0])))
