"""Updates that are a random projection of a few numbers, of the whole model's or of a matrix'.

The projection P (D, d) of all entries of all matrices has columns of unit length, nearly
orthogonal. It is never stored: a chunk of its rows is drawn on the host in fp32 from a seed, the
matrix's name and the chunk's number, whenever it is wanted. Entries of a matrix count column by
column, so that a panel of columns is a run of them.

    fastfood   chunks of blocks ``H G Pi H B / sqrt(l sum G^2)``, l the power of two from d on: B
               signs and Pi a permutation of the matrix, G normal, H Walsh-Hadamard: l log l for l
               entries
    dense      normal
    sparse     +-1 in one of sqrt(D) rows, sqrt(D) in a column: dealt to the columns by turns, at
               random rows
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..linalg import walsh
from .columns import Columns

Form = Literal["fastfood", "dense", "sparse"]
#: numbers drawn at once; what a file's numbers mean depends on it
DRAWN = 1 << 18


class Projected(Columns):
    """``Delta = lam P z``: z (d,) shared, lam one number that starts at 1, or fixed there.

    total: D, entries of all matrices.
    """

    def __init__(self, place: Place, form: Form, d: int, total: int, scaled: bool, seed: int,
                 shared: Any):
        super().__init__()
        self.out, self.inp, self.form, self.d, self.total = place.out, place.inp, form, d, total
        self.length = 1 << max(0, d - 1).bit_length()        # l
        self.salt = f"{seed}/{place.name}"
        self.__dict__["shared"] = shared               # the root owns it
        if scaled:
            self.lam = nn.Parameter(torch.ones(1))
            self.lam.burnish_decay = False               # type: ignore[attr-defined]
        if form == "fastfood":
            g = self._generator("mixed")
            signs = torch.randint(2, (self.length,), generator=g, device="cpu")
            self.register_buffer("signs", signs.float() * 2 - 1, persistent=False)
            order = torch.randperm(self.length, generator=g, device="cpu")
            self.register_buffer("order", order, persistent=False)

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        return (self.shared.z,)

    def _generator(self, what: object) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.salt}/{what}".encode()))

    @property
    def chunk(self) -> int:
        """Entries that are made together: no more than the matrix has, but for a block's rest."""
        size = self.out * self.inp
        if self.form == "dense":
            return max(1, min(DRAWN // self.d, size))
        blocks = min(DRAWN, size + self.length - 1) // self.length
        return max(1, blocks) * self.length

    def entries_of(self, c: int, z: Tensor, mixed: Tensor | None) -> Tensor:
        """Entries of the c-th chunk, differentiable in z. mixed: ``Pi H B z``."""
        g, n = self._generator(c), self.chunk
        if mixed is not None:
            G = torch.randn(n // self.length, self.length, generator=g, device="cpu")
            G = G / torch.linalg.vector_norm(G, dim=1, keepdim=True)
            return walsh(G.to(z) * mixed).flatten() * self.total**-0.5
        if self.form == "dense":
            rows = torch.randn(n, self.d, generator=g, device="cpu")
            return rows.to(z) @ z * self.total**-0.5
        k = max(1, round(n * self.d * self.total**-0.5))
        row, sign = (torch.randint(m, (k,), generator=g, device="cpu").to(z.device)
                     for m in (n, 2))
        first = torch.randint(self.d, (1,), generator=g, device="cpu")
        column = ((torch.arange(k, device="cpu") + first) % self.d).to(z.device)
        values = z[column] * (sign.to(z) * 2 - 1) * self.total**-0.25
        return z.new_zeros(n).index_add(0, row, values)

    def columns(self, i0: int, i1: int) -> Tensor:
        z, n, mixed = self.shared.z, self.chunk, None
        if self.form == "fastfood":
            padded = torch.cat([z, z.new_zeros(self.length - self.d)])
            mixed = walsh(padded * self.signs)[self.order]
        first, last = i0 * self.out, i1 * self.out
        made = [self.entries_of(c, z, mixed) for c in range(first // n, -(-last // n))]
        flat = torch.cat(made)[first % n :][: last - first]
        Delta = flat.view(i1 - i0, self.out).t()
        return Delta * self.lam if hasattr(self, "lam") else Delta
