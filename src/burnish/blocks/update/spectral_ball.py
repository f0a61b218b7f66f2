"""An update whose spectral norm stays within a bound: how far one layer may carry two inputs apart.

    |(W + D) x - (W + D) y| <= (||W||_2 + ||D||_2) |x - y|

Of a chain ``D = s B A`` nothing of D's size is made: with ``B = Q_b R_b`` and ``A^T = Q_a R_a``
the singular values are those of ``s R_b R_a^T`` (R, R), the left vectors are ``Q_b U``.

    clipped     U min(S, bound) V^T: the matrix in the ball that is nearest to D in ||.||_F. It is
                ``(I - U diag(1 - min(1, bound / S)) U^T) D``, so that a left factor alone changes
    excess      ``max(||D||_2 - bound, 0)^2``, differentiable: ``||D||_2 = u^T D v`` has the
                gradient u v^T where the largest singular value is single
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


@torch.no_grad()
def chain(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U (..., O, k), S (..., k), V^T (..., k, I)) of ``B A``, S falling; k the rank at most."""
    Qb, Rb = torch.linalg.qr(_wide(B))
    Qa, Ra = torch.linalg.qr(_wide(A).mT)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vt @ Qa.mT


@torch.no_grad()
def clip_(left: Tensor, U: Tensor, S: Tensor, bound: float) -> None:
    """The left factor (..., O, R) of a matrix with these singular vectors and values, so changed
    that the matrix is clipped (bound > 0); one within the ball stays as it is, bit for bit."""
    less = 1 - (bound / S).clamp_max(1)
    L = _wide(left)
    left.copy_(L - U @ (less.unsqueeze(-1) * (U.mT @ L)))


def excess(norm: Tensor, bound: float) -> Tensor:
    """``sum max(norm - bound, 0)^2``."""
    return (norm - bound).clamp_min(0).square().sum()


def norm_of_chain(B: Tensor, A: Tensor) -> Tensor:
    """``||B A||_2`` (...,), with a gradient."""
    U, _, Vt = chain(B, A)
    u, v = U[..., :1], Vt[..., :1, :].mT
    return ((u.mT @ B.to(u.dtype)) @ (A.to(u.dtype) @ v))[..., 0, 0]
