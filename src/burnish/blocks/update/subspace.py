"""Subspaces of a gradient: down to a few rows or columns, and back, panel by panel.

For W (m, n) a basis has a left factor P (m, r), a right factor Q (r, n), or both::

    left    R = P^T G    (r, n)     back  P N
    right   R = G Q^T    (m, r)     back  N Q
    full    R = P^T G Q^T  (r, r)   back  P N Q
    columns R = G[:, idx] (m, r)    back  N in those columns, zero elsewhere
    rows    R = G[idx]    (r, n)    back  N in those rows
    entries R_ij = G[i, idx_ij]     (m, r)    back  N in r entries of each row
    whole   R = G, or nothing       (a matrix whose turn it is, or is not)

``std`` is right when m >= n, else left: the factor sits on the short side, so with a = min(m, n)
and c = max(m, n) the factor has a r entries and R has c r. ``reverse_std`` is the opposite.
Convolutions are seen as (out, rest). Products accumulate in fp32 whatever dtype factors have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...core.errors import RecipeError
from .noise import CounterNoise
from .rules import accumulator

Kind = Literal["svd", "randomized", "gaussian", "orthogonal", "columns", "rows", "entries"]
Side = Literal["std", "reverse_std", "left", "right", "full"]
AtRefresh = Literal["keep", "reset", "restart", "rotate"]

#: kinds that pick entries as they stand, instead of combining them
PICKED = ("columns", "rows", "entries")


def matrix(p: Tensor) -> Tensor:
    """A dense tensor as a (first dimension in memory, rest) view; no copy for any stride order.

    For ordinary layouts this is (out, rest); a channels-last convolution gets its columns in
    another order and a transposed weight its transpose, which is the same to a projection.
    """
    flat, shape = in_memory_order(p)
    return flat.reshape(shape[0], math.prod(shape[1:]))


def in_memory_order(p: Tensor, like: Tensor | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """(p with its dimensions sorted by the strides of `like`, that shape)."""
    like = p if like is None else like
    order = sorted(range(like.dim()), key=lambda d: (-like.stride(d), d))
    out = p.permute(order)
    return out, tuple(out.shape)


def panels(rows: int, width: int, numel: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `numel` entries each."""
    height = max(1, numel // max(1, width))
    for lo in range(0, rows, height):
        yield lo, min(lo + height, rows)


@dataclass(frozen=True)
class Basis:
    """The factors of one subspace, as stored; products are done in `dtype`. Or what it picks:
    columns, rows, `entries` (m, r) by their column, all of the matrix or nothing of it (`live`).
    """

    left: Tensor | None
    right: Tensor | None
    columns: Tensor | None
    width: int
    dtype: torch.dtype = torch.float32
    rows: Tensor | None = None
    entries: Tensor | None = None
    live: bool | None = None

    def down(self, G_mn: Tensor, numel: int = 1 << 22) -> Tensor:
        """R in `dtype`; a low-precision G is widened one row panel at a time."""
        m, n = G_mn.shape
        if self.live is not None:
            return G_mn[: m * self.live].to(self.dtype, copy=True)
        if self.columns is not None:
            return G_mn[:, self.columns.long()].to(self.dtype)
        if self.rows is not None:
            return G_mn[self.rows.long()].to(self.dtype)
        if self.entries is not None:
            return G_mn.gather(1, self.entries).to(self.dtype)
        right = None if self.right is None else self.right.to(self.dtype).t()
        left = None if self.left is None else self.left.to(self.dtype).t()
        if left is None:
            out = torch.empty(m, right.shape[1], dtype=self.dtype, device=G_mn.device)
        else:
            r = n if right is None else right.shape[1]
            out = torch.zeros(left.shape[0], r, dtype=self.dtype, device=G_mn.device)
        step = m * n if G_mn.dtype == self.dtype else numel
        for lo, hi in panels(m, n, step):
            g = G_mn[lo:hi].to(self.dtype)
            if right is not None:
                g = g @ right
            if left is None:
                out[lo:hi] = g
            else:
                out.addmm_(left[:, lo:hi], g)
        return out

    def up(self, N: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo:hi of back(N), (hi - lo, n) in `dtype`, not to be changed."""
        if self.live:
            return N[lo:hi]
        if self.rows is not None:
            here, at = self._rows(lo, hi, N.device)
            return N[at].masked_fill_(~here[:, None], 0.0)
        if self.left is None and self.right is None:
            out = torch.zeros(hi - lo, self.width, dtype=self.dtype, device=N.device)
            if self.entries is not None:
                return out.scatter_(1, self.entries[lo:hi], N[lo:hi])
            return out if self.columns is None else \
                out.index_copy_(1, self.columns.long(), N[lo:hi])
        rows = N[lo:hi] if self.left is None else self.left[lo:hi].to(self.dtype) @ N
        return rows if self.right is None else rows @ self.right.to(self.dtype)

    def _rows(self, lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(is this row picked, its place among those that are)."""
        wanted = torch.arange(lo, hi, dtype=torch.int32, device=device)
        at = torch.searchsorted(self.rows, wanted).clamp_(max=len(self.rows) - 1)
        return self.rows[at] == wanted, at

    def mute_(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo:hi of a matrix, zero where entries are picked; x itself where none are."""
        if self.live:
            return x.zero_()
        if self.columns is not None:
            return x.index_fill_(1, self.columns.long(), 0.0)
        if self.rows is not None:
            return x.masked_fill_(self._rows(lo, hi, x.device)[0][:, None], 0.0)
        return x if self.entries is None else x.scatter_(1, self.entries[lo:hi], 0.0)

    def tensors(self) -> dict[str, Tensor]:
        named = {"left": self.left, "right": self.right, "columns": self.columns,
                 "rows": self.rows}
        return {k: v for k, v in named.items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class SubspaceMap:
    """How the basis of one matrix is chosen.

    kind: "svd" takes singular vectors of the gradient, exactly (with their largest entry positive,
        on every device); "randomized" finds their span with
        a Gaussian sketch (oversampling 8, two power iterations; Halko et al., 2011); "gaussian"
        draws N(0, 1/r) entries again from the counter stream at every use and stores nothing;
        "orthogonal" draws orthonormal vectors, of any direction alike. "columns" and "rows" draw
        those numbers without replacement; "entries" draws r of each row, again at every use.
    rank: clamped to min(m, n) (columns and entries: to n, rows: to m).
    density: the rank as a share of what it is clamped to, at least 1; with 0 nothing is inside.
    """

    rank: int = 0
    density: float | None = None
    kind: Kind = "svd"
    side: Side = "std"

    def __post_init__(self) -> None:
        if self.density is not None:
            if not 0 <= self.density <= 1:
                raise RecipeError(f"a subspace's density is a share from 0 to 1, got "
                                  f"{self.density:g}")
        elif self.rank < 1:
            raise RecipeError(f"a subspace needs rank >= 1, got {self.rank}")
        if self.kind == "gaussian" and self.side == "full":
            raise RecipeError("a gaussian subspace has one side; use left, right or std")

    def sides(self, m: int, n: int) -> tuple[bool, bool]:
        """(has a left factor, has a right factor)."""
        if self.kind in PICKED:
            return self.kind == "rows", self.kind != "rows"
        right = {"std": m >= n, "reverse_std": m < n, "left": False}.get(self.side, True)
        return self.side == "full" or not right, right

    def size(self, m: int, n: int) -> int:
        """r of a matrix of this shape."""
        side = {"columns": n, "entries": n, "rows": m}.get(self.kind, min(m, n))
        if self.density is None:
            return min(self.rank, side)
        return max(1, round(self.density * side)) if self.density else 0

    def shape(self, m: int, n: int) -> tuple[int, int]:
        """Shape of R."""
        r = self.size(m, n)
        left, right = self.sides(m, n)
        return r if left else m, r if right else n

    def bytes(self, m: int, n: int, itemsize: int) -> int:
        """Of what is stored of the basis: its factors in the weight's dtype, or column numbers."""
        if not self.stores():
            return 0
        left, right = self.sides(m, n)
        r = self.size(m, n)
        if self.kind in PICKED:
            return 4 * r
        return itemsize * r * (m * left + n * right)

    def stores(self) -> bool:
        return self.kind not in ("gaussian", "entries") and self.density != 0

    def basis(self, G_mn: Tensor, noise: CounterNoise, turn: int, dtype: torch.dtype,
              old: Basis | None = None) -> Basis:
        """The basis for refresh number `turn`. Where G is zero or not finite, `old` stays."""
        m, n = G_mn.shape
        left, right = self.sides(m, n)
        wide = accumulator(G_mn.dtype)
        r = self.size(m, n)
        if not r:
            return Basis(None, None, None, n, wide, live=False)
        if self.kind == "gaussian":
            side = m if left else n
            z = noise.normal(side * r, turn=turn, device=G_mn.device).div_(math.sqrt(r))
            z = z.to(wide)
            return Basis(z.view(m, r) if left else None, z.view(r, n) if right else None,
                         None, n, wide)
        if self.kind in PICKED:
            return self._picked(m, n, r, noise, turn, wide, G_mn.device)
        if self.kind == "orthogonal":
            return self._drawn(m, n, r, noise, turn, dtype, wide, G_mn.device)
        if not _usable(G_mn):                        # nothing to learn from: no new basis
            if old is not None:
                return old
            eye = torch.eye(max(m, n), r, device=G_mn.device)
            P, Q = (eye[:m] if left else None), (eye[:n].t() if right else None)
        else:
            P, Q = self._span(G_mn.to(wide), r, noise, turn, left, right)
            P = None if P is None else P * _signs(P, 0)
            Q = None if Q is None else Q * _signs(Q, 1)
        return Basis(None if P is None else P.to(dtype).contiguous(),
                     None if Q is None else Q.to(dtype).contiguous(), None, n, wide)

    def _picked(self, m: int, n: int, r: int, noise: CounterNoise, turn: int,
                wide: torch.dtype, device: torch.device) -> Basis:
        if self.kind == "entries":
            return Basis(None, None, None, n, wide,
                         entries=_spread(m, n, r, noise.uniform(m * (r + 1), turn=turn,
                                                                device=device).view(m, r + 1)))
        keys = noise.normal(m if self.kind == "rows" else n, turn=turn, device=device)
        chosen = keys.topk(r).indices.sort().values.int()
        return Basis(None, None, None, n, wide, rows=chosen) if self.kind == "rows" else \
            Basis(None, None, chosen, n, wide)

    def _drawn(self, m: int, n: int, r: int, noise: CounterNoise, turn: int, dtype: torch.dtype,
               wide: torch.dtype, device: torch.device) -> Basis:
        left, right = self.sides(m, n)
        z = noise.normal((m * left + n * right) * r, turn=turn, device=device).to(wide)
        P = torch.linalg.qr(z[: m * r].view(m, r))[0].to(dtype) if left else None
        Q = torch.linalg.qr(z[-n * r :].view(n, r))[0].t().to(dtype).contiguous() \
            if right else None
        return Basis(P, Q, None, n, wide)

    def _span(self, G: Tensor, r: int, noise: CounterNoise, turn: int, left: bool,
              right: bool) -> tuple[Tensor | None, Tensor | None]:
        """(U[:, :r] if `left`, V^T[:r] if `right`) of G."""
        m, n = G.shape
        k = r + 8
        if self.kind == "svd" or k >= min(m, n):
            if left and not right and m < n:         # the short side: its factor is all we make
                return torch.linalg.svd(_triangle(G.t()).t())[0][:, :r], None
            if right and not left and n < m:
                return None, torch.linalg.svd(_triangle(G))[2][:r]
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            return (U[:, :r] if left else None), (Vh[:r] if right else None)
        sketch = noise.normal(n * k, turn=turn, device=G.device).view(n, k).to(G.dtype)
        Y, _ = torch.linalg.qr(G @ sketch)
        for _ in range(2):
            Z, _ = torch.linalg.qr(G.t() @ Y)
            Y, _ = torch.linalg.qr(G @ Z)
        U, _, Vh = torch.linalg.svd(Y.t() @ G, full_matrices=False)
        return (Y @ U[:, :r] if left else None), (Vh[:r] if right else None)


def _spread(m: int, n: int, r: int, u: Tensor) -> Tensor:
    """(m, r) numbers below n, those of a row all different: one of each of r runs as long as one
    another, in a circle that begins anywhere, so that each number is as likely as any other.

    u: (m, r + 1) of U(0, 1).
    """
    if r == n:                                       # in order: a moment stays with its entry
        return torch.arange(n, device=u.device).expand(m, n)
    edges = torch.arange(r + 1, device=u.device) * n // r
    lo, width = edges[:-1], edges[1:] - edges[:-1]
    inside = torch.minimum((u[:, :r] * width).long(), width - 1)
    return (lo + inside + (u[:, r:] * n).long()) % n


def _signs(vectors: Tensor, along: int) -> Tensor:
    """The signs that make the largest entry of each singular vector positive: a factorisation
    leaves them open, and moments that stay when the basis changes would follow its whim."""
    largest = vectors.abs().argmax(along, keepdim=True)
    return vectors.gather(along, largest).sign()


def _usable(G: Tensor) -> bool:
    """Finite and not all zero, by one reduction."""
    if isinstance(G, FakeTensor):
        return True
    largest = float(torch.linalg.vector_norm(G, ord=math.inf))
    return math.isfinite(largest) and largest > 0


def _triangle(tall: Tensor) -> Tensor:
    """R of ``tall = Q R``, square: it has the right singular vectors of `tall`, and Q is never
    formed."""
    return torch.linalg.qr(tall, mode="r")[1]


def rotate(M: Tensor, old: Basis, new: Basis, squared: bool = False) -> Tensor:
    """A moment of the old basis in the new one: ``P_new^T P_old M`` (and the same on the right).

    squared: for second moments, whose rotation uses the squared entries, so they stay >= 0.
    """
    def change(a: Tensor) -> Tensor:
        return a.square() if squared else a

    if new.left is not None:
        M = change(new.left.to(M.dtype).t() @ old.left.to(M.dtype)) @ M
    if new.right is not None:
        M = M @ change(old.right.to(M.dtype) @ new.right.to(M.dtype).t())
    return M
