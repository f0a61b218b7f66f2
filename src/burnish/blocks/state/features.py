"""Layers of random features: fixed functions of a hidden state, and one matrix that trains.

    f(h) = V phi(h) + c        phi(h) = m^(-1/2) relu(G h)

G (m, D) is Gaussian, drawn once and frozen, so ``phi(x) . phi(w)`` has the mean
``|x| |w| (sin t + (pi - t) cos t) / (2 pi)``, t the angle between x and w, and an error of
m^(-1/2). A whole layer ``W2 k(W1 x)`` of that kernel k is ``V phi(x)`` with V = W2 phi(W1).

Kept for backward: phi(h), m numbers per token, and not h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.draw import drawn


def directions(features: int, width: int, seed: int, orthogonal: bool) -> Tensor:
    """G (features, width), entries N(0, 1); orthogonal: at right angles to each other, width of
    them at a time, with lengths as independent rows have."""
    with drawn(seed):
        G = torch.randn(features, width)
        if orthogonal:
            lengths = torch.randn(features, width).norm(dim=1, keepdim=True)
            G = torch.cat([_turned(part) for part in G.split(width)]) * lengths
    return G


def _turned(part: Tensor) -> Tensor:
    """Rows at right angles, in a direction that is uniform: the signs of a QR are not."""
    Q, R = torch.linalg.qr(part.t())
    return (Q * R.diagonal().sign()).t()


class Frozen(nn.Module):
    """G / sqrt(m) as a buffer, for all places of one width."""

    G: Tensor

    def __init__(self, features: int, width: int, seed: int, orthogonal: bool):
        super().__init__()
        G = directions(features, width, seed, orthogonal) * features**-0.5
        self.register_buffer("G", G)


class RandomFeatures(nn.Module):
    """``f(h) = V phi(h) + c``: V (O, m) and c (O,) zero, so nothing at the start.

    frozen: holds G; who holds it for others `owns` it, the others borrow it.
    """

    frozen: Frozen

    def __init__(self, frozen: Frozen, out: int, owns: bool):
        super().__init__()
        if owns:
            self.frozen = frozen
        else:
            self.__dict__["frozen"] = frozen
        self.V = nn.Parameter(torch.zeros(out, frozen.G.shape[0]))
        self.c = nn.Parameter(torch.zeros(out))

    def forward(self, h: Tensor) -> Tensor:
        phi = F.relu(F.linear(h, self.frozen.G.to(h.dtype)))
        return F.linear(phi, self.V.to(phi.dtype), self.c.to(phi.dtype))
