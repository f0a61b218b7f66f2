"""Updates whose outer factors are made from the weight and stay: only what is between them trains.

``Delta = s L core R`` with R (r, in) and L (out, r) frozen, in the file (no two machines decompose
a matrix alike). Tokens see r numbers, which are all that backward keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Site
from .path import Path
from .rotation import cayley, skew
from .start import decomposed


class Between(Path):
    """Subclasses give :meth:`core`, and ``begin(values)`` if their start is read off the weight."""

    def __init__(self, out: int, inp: int, rank: int, scale: float):
        super().__init__()
        self.inp, self.scale = inp, scale
        self.register_buffer("L", torch.zeros(out, rank))
        self.register_buffer("R", torch.zeros(rank, inp))

    @property
    def into(self) -> Tensor:
        return self.R

    def core(self, h: Tensor) -> Tensor:
        """(N, r) from (N, r), in h's precision; linear in h, nothing at the start."""
        raise NotImplementedError

    def begin(self, values: Tensor) -> None:
        """Read what the decomposition has between L and R (the r leading of them)."""

    def path(self, h: Tensor) -> Tensor:
        return self.core(h) @ self.L.t().to(h.dtype) * self.scale

    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        h = F.embedding(index, self.R.t(), padding)
        return self.path(h.flatten(0, -2)).view(*index.shape, -1)

    @torch.no_grad()
    def read(self, site: Site, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Between:
        """Take (L, values, R) of the weight; shapes alone where the site is `blank`.

        Raises CheckError as :func:`~burnish.blocks.weight.start.decomposed` does.
        """
        self.to(site.weight.device)
        for p in self.parameters():
            p.burnish_decay = False
        if site.blank:
            return self
        L, values, R = decomposed(site, split)
        rank = self.R.shape[0]
        self.L.copy_(L[:, :rank])
        self.R.copy_(R[:rank])
        self.begin(values[:rank])
        return self


class Diagonal(Between):
    """``Delta = s L diag(z - z0) R``; z (r,) begins at z0, which the file holds."""

    def __init__(self, out: int, inp: int, rank: int, scale: float):
        super().__init__(out, inp, rank, scale)
        self.z = nn.Parameter(torch.zeros(rank))
        self.register_buffer("z0", torch.zeros(rank))

    def begin(self, values: Tensor) -> None:
        self.z.copy_(values)
        self.z0.copy_(values)

    def core(self, h: Tensor) -> Tensor:
        return h * (self.z - self.z0).to(h.dtype)


class Shifted(Between):
    """``Delta = L diag(relu(sigma + delta) - sigma) R``; sigma stays and is in the file."""

    def __init__(self, out: int, inp: int, rank: int):
        super().__init__(out, inp, rank, 1.0)
        self.delta = nn.Parameter(torch.zeros(rank))
        self.register_buffer("sigma", torch.zeros(rank))

    def begin(self, values: Tensor) -> None:
        self.sigma.copy_(values)

    def core(self, h: Tensor) -> Tensor:
        # a value that is 0 has slope 0 in torch's relu: such a direction stays as it is
        return h * (torch.relu(self.sigma + self.delta) - self.sigma).to(h.dtype)


class Patterned(Between):
    """``Delta = L M R``, M (r, r) with entries at `index` (n,), flat positions row by row."""

    def __init__(self, out: int, inp: int, rank: int, index: Tensor):
        super().__init__(out, inp, rank, 1.0)
        self.values = nn.Parameter(torch.zeros(index.numel()))
        self.register_buffer("index", index)

    def matrix(self) -> Tensor:
        r = self.R.shape[0]
        return self.values.new_zeros(r * r).index_put((self.index,), self.values).view(r, r)

    def core(self, h: Tensor) -> Tensor:
        return h @ self.matrix().t().to(h.dtype)


class Steered(Between):
    """``Delta = L (sum_j v_j P_j) R``, L and R with the roots of the values; P (dimension, r, r)
    stays and is in the file, v is ``shared.<name>`` (dimension,), which several matrices read."""

    def __init__(self, out: int, inp: int, P: Tensor, shared: Any, name: str):
        super().__init__(out, inp, P.shape[-1], 1.0)
        self.register_buffer("P", P)
        self.__dict__["shared"], self.name = shared, name         # the root owns it

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return (getattr(self.shared, self.name),)

    def begin(self, values: Tensor) -> None:
        self.L.mul_(values.sqrt())
        self.R.mul_(values.sqrt()[:, None])

    def core(self, h: Tensor) -> Tensor:
        (v,) = self.borrowed
        return h @ torch.tensordot(v, self.P.to(v.dtype), 1).t().to(h.dtype)


class Turned(Between):
    """``Delta = L (diag(b) T diag(a) - I) R``, L and R with the values of the decomposition: all in
    L, or (`balanced`) their roots in both.

    T = ``(I + Q)(I - Q)^-1`` of a skew Q, `upper` (1, r (r - 1) / 2) its entries above the
    diagonal (see rotation.py for `terms`), or, free, a matrix T (r, r). bound: where ``||Q||_F`` is
    larger, Q stands for its multiple that long. a, b (r,), or None; all at the identity.
    """

    def __init__(self, out: int, inp: int, rank: int, *, terms: int, bound: float | None,
                 free: bool, gain_in: bool, gain_out: bool, balanced: bool):
        super().__init__(out, inp, rank, 1.0)
        self.terms, self.bound, self.balanced = terms, bound, balanced
        self.upper = None if free else nn.Parameter(torch.zeros(1, rank * (rank - 1) // 2))
        self.T = nn.Parameter(torch.eye(rank)) if free else None
        self.a = nn.Parameter(torch.ones(rank)) if gain_in else None
        self.b = nn.Parameter(torch.ones(rank)) if gain_out else None

    def begin(self, values: Tensor) -> None:
        root = values.sqrt()
        self.L.mul_(root if self.balanced else values)
        if self.balanced:
            self.R.mul_(root[:, None])

    def move(self) -> Tensor:
        """What stands between L and R: (r, r), exactly nothing at the start."""
        if self.upper is None:
            M = self.T - torch.eye(len(self.T), dtype=self.T.dtype, device=self.T.device)
        else:
            Q = skew(self.upper, self.R.shape[0])
            if self.bound is not None:
                Q = Q * (self.bound / torch.linalg.vector_norm(Q).clamp_min(self.bound))
            M = cayley(Q, self.terms)[0]
        for gain, axis in ((self.a, 0), (self.b, 1)):
            if gain is not None:                 # g T - I = g (T - I) + (g - I), g a diagonal
                M = M * gain.unsqueeze(axis) + torch.diag(gain - 1)
        return M

    def core(self, h: Tensor) -> Tensor:
        return h @ self.move().t().to(h.dtype)
