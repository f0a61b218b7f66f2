"""Updates whose outer factors are made from the weight and stay: only what is between them trains.

``Delta = s L core R`` with R (r, in) and L (out, r) frozen, in the file (no two machines decompose
a matrix alike). Tokens see r numbers, which are all that backward keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core.site import Site
from .path import Path
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
