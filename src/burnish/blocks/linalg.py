"""Products in the order that costs least, and decompositions that are the same for the same
matrix, whatever was drawn before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .matmul import mm
from .tape.activations import Strips

#: passes of the subspace iteration, and directions beyond those asked for
PASSES, BESIDES = 4, 8


def over_tokens(g_NO: Tensor | Strips, h_NR: Tensor) -> Tensor:
    """``g^T h`` (O, R), a sum over tokens, written with the narrower matrix first.

    The same numbers either way; but with 8 columns or fewer in h, ``g.t() @ h`` takes a CPU's
    library 9 times as long as ``h.t() @ g`` (N = 6304, O = 3072), a third of the frozen product
    beside it. Strips of g are summed one after the other.
    """
    if isinstance(g_NO, Strips):
        total: Tensor | None = None
        for n0, n1, g in g_NO:
            part = mm(h_NR[n0:n1].t(), g)
            total = part if total is None else total.add_(part)
        return total.t()
    return mm(h_NR.t(), g_NO).t() if h_NR.shape[1] <= g_NO.shape[1] else g_NO.t() @ h_NR


def svd(M: Tensor, k: int, passes: int = PASSES) -> tuple[Tensor, Tensor, Tensor]:
    """(U (m, k), S (k,), V (k, n)) of the k largest singular values, S falling; fewer where M has
    fewer.

    Exact where that costs little, else by subspace iteration from a fixed sketch: nothing is
    drawn from a global generator, so the same matrix has the same answer.
    """
    k = min(k, *M.shape)
    if min(M.shape) <= 4 * (k + BESIDES):
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        return U[:, :k], S[:k], V[:k]
    return sketched(M, k, passes)


def sketched(M: Tensor, k: int, passes: int = PASSES) -> tuple[Tensor, Tensor, Tensor]:
    """The same by subspace iteration, whatever the size of M."""
    k = min(k, *M.shape)
    g = torch.Generator().manual_seed(0)
    wide = min(k + BESIDES, *M.shape)
    sketch = torch.randn(M.shape[1], wide, generator=g, dtype=torch.float32).to(M)
    Q = torch.linalg.qr(M @ sketch).Q
    for _ in range(passes):
        Q = torch.linalg.qr(M.t() @ Q).Q
        Q = torch.linalg.qr(M @ Q).Q
    U, S, V = torch.linalg.svd(Q.t() @ M, full_matrices=False)
    return (Q @ U)[:, :k], S[:k], V[:k]


def polar(M: Tensor, passes: int = 30) -> Tensor:
    """``U V^T`` of the decomposition ``M = U S V^T``, the subgradient of its nuclear norm, by
    Newton-Schulz: ``X <- (3 X - X X^T X) / 2`` from ``M / ||M||_F``.

    Products alone, and one matrix of M's size beside X. A singular value below 1.5^-passes of
    ``||M||_F`` (5e-6) ends below one, and none of them above: what is all but zero has no
    direction that rounding could blow up.
    """
    X = M if M.shape[0] <= M.shape[1] else M.t()
    X = X / torch.linalg.vector_norm(X).clamp_min(torch.finfo(X.dtype).tiny)
    for _ in range(passes):
        X = torch.addmm(X, X @ X.t(), X, beta=1.5, alpha=-0.5)
    return X if M.shape[0] <= M.shape[1] else X.t()


def walsh(x: Tensor) -> Tensor:
    """``H x`` along the last dimension, a power of two long: H the Walsh-Hadamard matrix of +-1,
    not normalised, symmetric; n log n additions."""
    made: Tensor = _Walsh.apply(x)
    return made


class _Walsh(torch.autograd.Function):
    """Linear and its own transpose, so nothing is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        n, h = x.shape[-1], 1
        while h < n:
            a, b = x.unflatten(-1, (-1, 2, h)).unbind(-2)
            x = torch.stack([a + b, a - b], -2).flatten(-3)
            h *= 2
        return x.clone() if n == 1 else x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return walsh(g)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return walsh(t)


@torch.no_grad()
def truncated_normal_(t: Tensor, std: float) -> Tensor:
    """Normal numbers of deviation `std`, cut at two of it; torch's own reads values, which a
    simulation does not have."""
    most = math.erf(2 / math.sqrt(2))
    return t.uniform_(-most, most).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2 * std, 2 * std)
