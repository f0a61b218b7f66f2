"""What a matrix of low rank leaves of a weight: greedy bilateral sketches.

    W = U V + S + noise        U = orth((W - S) V^T)      V = U^T (W - S)      S = cut(W - U V)

The rank grows: after every two rounds of these V gets the first rows of R of the QR decomposition
of what is left. Those rows are ``Q^T R`` with Q an orthonormal basis of the first columns alone,
so no decomposition of the whole is needed, and nothing is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: rows that V gains, and rounds between
GROW, INNER = 5, 2


@torch.no_grad()
def remainder(W: Tensor, rounds: int, cut: float) -> Tensor:
    """``W - U V`` after at most so many growths; it ends earlier where nothing is left, or where V
    has as many rows as W has room for. Its entries above `cut` in size are S."""
    rank = min(W.shape)
    V = W.new_empty(0, W.shape[1])
    S, E = torch.zeros_like(W), W
    for _ in range(rounds):
        left = E - S
        if len(V) + GROW > rank or not bool(left.any()):
            break
        V = torch.cat([V, torch.linalg.qr(left[:, :GROW]).Q.t() @ left])
        for _ in range(INNER):
            rest = W - S
            U = torch.linalg.qr(rest @ V.t()).Q
            V = U.t() @ rest
            E = W - U @ V
            S = torch.where(E.abs() > cut, E, 0)
    return E
