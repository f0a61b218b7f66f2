"""Updates within the leading right directions of a weight, cluster by cluster of its outputs.

    Delta[o] = B[o] A[c(o)] V,    W ~ U diag(S) V

V (r, in) stays; the outputs o fall into K clusters c(o) by their rows of U. Letters: O out, s rank
of a cluster.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .path import Path


@torch.no_grad()
def leading(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(U (O, r), V (r, in)) of a sketch of W, r as `rank` or what W has: two passes of subspace
    iteration from this seed, on the host and in single precision (torch.svd_lowrank's numbers)."""
    W = W.detach().to("cpu", torch.float32)
    tall = W if W.shape[0] >= W.shape[1] else W.t()
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(tall @ torch.randn(tall.shape[1], min(rank, *W.shape), generator=g,
                                           dtype=torch.float32, device="cpu")).Q
    for _ in range(2):
        Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.t() @ Q).Q).Q
    U, _, Vt = torch.linalg.svd(Q.t() @ tall, full_matrices=False)
    return (Q @ U, Vt) if tall is W else (Vt.t(), (Q @ U).t().contiguous())


def clusters(rows: Tensor, k: int, passes: int = 10, seed: int = 123456789) -> Tensor:
    """Which of at most k clusters each row (O, r) is in, by k-means: centres begin at rows that
    numpy draws from this seed, and stop moving after `passes`, or sooner where nothing changes. A
    cluster that is left empty takes the row farthest from its own."""
    X = rows.detach().float().numpy()
    X = X - X.mean(0)
    n, k = len(X), min(k, len(X))
    share = np.ones(n, np.float32)
    first = np.random.RandomState(seed).choice(n, k, False, share / share.sum())
    centres, labels = X[first].astype(np.float64), np.full(n, -1)
    still = float(X.var(0).mean()) * 1e-4
    for _ in range(passes):
        far = _distances(X, centres)
        now = far.argmin(1)
        moved = _means(X, now, far.min(1), k)
        shift, centres = float(((moved - centres) ** 2).sum()), moved
        if (now == labels).all():
            return torch.from_numpy(now)
        labels = now
        if shift <= still:
            break
    return torch.from_numpy(_distances(X, centres).argmin(1))


def _distances(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    near: np.ndarray = (centres**2).sum(1) - 2 * X.astype(np.float64) @ centres.T
    return near + (X**2).sum(1)[:, None]


def _means(X: np.ndarray, labels: np.ndarray, far: np.ndarray, k: int) -> np.ndarray:
    labels = labels.copy()
    empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
    labels[np.argsort(-far, kind="stable")[: len(empty)]] = empty
    sums = np.zeros((k, X.shape[1]))
    np.add.at(sums, labels, X)
    made: np.ndarray = sums / np.bincount(labels, minlength=k).clip(1)[:, None]
    return made


class Clustered(Path):
    """V (r, in) and the cluster of each output, of k, are frozen and in the file; A (k, s, r), B
    (O, s) train."""

    def __init__(self, out: int, inp: int, r: int, k: int, rank: int):
        super().__init__()
        self.inp = inp
        self.register_buffer("V", torch.zeros(r, inp))
        self.register_buffer("cluster", torch.zeros(out, dtype=torch.long))
        self.A, self.B = nn.Parameter(torch.zeros(k, rank, r)), nn.Parameter(torch.zeros(out, rank))

    @property
    def into(self) -> Tensor:
        return self.V

    @torch.no_grad()
    def begin(self, U: Tensor, V: Tensor, cluster: Tensor, threshold: float | None) -> None:
        """A_c are the leading right directions of its rows of U, as many as it has rows, and, with
        a threshold, as many as have a square above this share of the first; the rest is 0."""
        self.V.copy_(V), self.cluster.copy_(cluster)
        for c, A in enumerate(self.A):
            _, S, Vt = torch.linalg.svd(U[cluster == c], full_matrices=False)
            s = min(A.shape[0], len(S))
            if threshold is not None and s:
                s = min(s, max(1, int((S**2 > threshold * S[0] ** 2).sum())))
            A[:s] = Vt[:s]

    def matrix(self) -> Tensor:
        """(O, r): what stands before V."""
        return torch.einsum("os,osr->or", self.B, self.A[self.cluster])

    def path(self, h: Tensor) -> Tensor:
        return h @ self.matrix().t().to(h.dtype)
