"""Inputs of linears as some of their rows: winner-take-all column-row sampling.

A weight's gradient ``dW = sum_n g_n x_n^T`` is a sum over N tokens. With probabilities
``p_n = |x_n| / sum |x|`` and room for k rows, the C likeliest tokens are taken as they are and
k - C more are drawn from the rest, with replacement and in proportion to p:

    dW^ = sum_{n in C} g_n x_n^T + sum_j (1 - P_C) / ((k - C) p_j) g_j x_j^T,     E[dW^] = dW

so what is kept is k rows, their numbers and their factors. C minimises ``(1 - P_C) / (k - C)``, of
which the variance is a multiple. Draws are stratified: one in each of k - C equal parts of what P
leaves, which changes no mean and makes no variance larger. Sizes depend on N and k alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .coded import Coded, Steps, weakly
from .functions import storage_of
from .roles import Role
from .saved import Policy


@torch.no_grad()
def drawn(norms: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(k numbers of rows in ascending order, their factors in fp64), 1 <= k <= N, for norms (N,).

    A row that was drawn again stands there again with factor 0. Rows of zeros have factor 0.
    """
    wide = norms.double()
    p, order = (wide / wide.sum().clamp_min(torch.finfo(torch.float64).tiny)).sort(descending=True)
    upto = p.cumsum(0)
    before = torch.cat([upto.new_zeros(1), upto[:k - 1]])             # P of the first 0 .. k-1
    slots = torch.arange(k, device=p.device)
    winners = ((upto[-1] - before) / (k - slots)).argmin().view(1)
    P, rest = before.gather(0, winners), k - winners
    u = torch.rand(k, generator=generator, dtype=torch.float64, device=p.device)
    u = P + (upto[-1] - P) * (slots - winners + u) / rest              # one in each stratum
    u = torch.minimum(u, torch.nextafter(upto[-1], upto.new_zeros(())))
    at = torch.searchsorted(upto, u, right=True).clamp_max(len(p) - 1)
    at = torch.where(slots < winners, slots, at)
    chance = p[at]
    factor = torch.where(slots < winners, 1.0, (upto[-1] - P) / (rest * chance))
    factor = torch.where(chance > 0, factor, 0.0)
    rows, by = order[at].sort()
    total = torch.zeros_like(p).index_add_(0, rows, factor[by])[rows]
    total[1:].masked_fill_(rows[1:] == rows[:-1], 0)
    return rows, total


def room(n: int, keep: float, least: int) -> int:
    """k of n rows."""
    return min(n, max(least, int(keep * n)))


def nbytes(k: int, width: int, itemsize: int) -> int:
    """Bytes of k rows, their numbers and their factors (fp32; fp64 beside fp64 rows)."""
    return k * (width * itemsize + 4 + max(4, itemsize))


class _Rows:
    """k rows of (N, width), waiting where the inner policy says."""

    def __init__(self, x: Tensor, k: int, inner: Policy, generator: torch.Generator | None):
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        rows, factor = drawn(norms, k, generator)
        self.n, self.width = x.shape
        self.held = [inner.pack(t) for t in (x.index_select(0, rows), rows.int(), factor.to(wide))]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """(N, width): the rows that were kept in their places, times their factors."""
        x, rows, factor = (h.open() for h in self.held)
        part = (x.to(factor.dtype) * factor.unsqueeze(1)).to(x.dtype)
        return x.new_zeros(self.n, self.width).index_add_(0, rows, part)


class _Sampled:
    """A tensor of which some rows are kept."""

    def __init__(self, rows: _Rows, shape: torch.Size):
        self.rows, self.shape = rows, shape

    def open(self) -> Tensor:
        return self.rows.whole().view(self.shape)


class Sampled(Coded):
    """keep: share of the rows; least: of them at least so many. seed: of the draws, which have a
    generator of their own. Readers of one input share one draw. What a linear reads and nobody
    keeps anyway is sampled; a ReLU in front of one keeps a bit a number, exactly, instead of it.

    taken, whole: since the last update, inputs that were sampled, and that were too short for it.
    """

    beside = "inputs that are kept for backward are sampled (wta_crs)"

    def __init__(self, keep: float = 0.3, least: int = 10, seed: int = 0):
        super().__init__(bits=0, norm=0, derivative=0, seed=seed)
        self.keep, self.least = keep, least
        self.taken = self.whole = 0

    def __reduce__(self) -> tuple:
        return type(self), (self.keep, self.least, self.seed), \
            {"inner": self.inner, "step": self.step}

    def pack(self, t: Tensor, role: Role | None = None) -> Any:
        key = storage_of(t)
        if role != "linear input" or key is None or not t.is_floating_point() or t.dim() < 2 \
                or not t.numel():
            return self._as_it_is(t, key, role)
        if self._found(self._exact, t, key) is not None:
            return self.inner.pack(t)                         # it is kept anyway
        if not self._smaller(t):
            self.whole += 1
            return self._as_it_is(t, key, role)
        whole = t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()
        rows = self._found(self._made, t, key) if whole else None
        if rows is None or rows.width != t.shape[-1]:
            rows = self._short(t.detach().reshape(-1, t.shape[-1]))
            self.taken += 1
            if whole:
                self._made[key] = weakly(t, rows)
        return _Sampled(rows, t.shape)

    def _short(self, x: Tensor) -> Any:
        """What is kept of (N, width): it has that `width`, and gives its ``whole()`` again."""
        return _Rows(x, self._room(x), self.inner, self.generator(x.device))

    def _room(self, t: Tensor) -> int:
        return room(t.numel() // t.shape[-1], self.keep, self.least)

    def _smaller(self, t: Tensor) -> bool:
        return nbytes(self._room(t), t.shape[-1], t.element_size()) < t.numel() * t.element_size()


class Taken(Steps):
    """Says once, after an update, that the passes before it kept no input for a linear alone."""

    said = False

    def __init__(self, tuned: Any, name: str):
        super().__init__(tuned)
        self.name = name

    def after_update(self, step: int) -> None:
        if not self.said and not self.policy.taken and not self.policy.whole:
            self.said = True
            warnings.warn(f"{self.name} saves nothing here: what linears read is kept for others, "
                          "or made again from what is (the lean tape); it acts beside "
                          "lean(on=False), or where inputs are kept whole", stacklevel=2)
        self.policy.taken = self.policy.whole = 0
