"""Sparse updates: k values at k fixed entries of a frozen matrix.

``y = x W^T + x Delta^T`` with ``Delta[row_k, col_k] = v_k``. Gradient: the entries of g^T x at the
indices, nothing else. Two evaluations, both exact: when the entries touch few columns, only those
columns of x are read and kept; otherwise the values are added to panels of W and one product
serves base and update. On CUDA the entries are summed by themselves (blocks/gpu/entries.py);
elsewhere they are picked from panels of g^T x.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from ...core.followed import is_fake, simulated
from ...core.site import Place
from ..gpu.entries import at_entries
from ..gpu.road import refusal
from .provided import Term


def spread(n: int, k: int, seed: int, key: str = "") -> Tensor:
    """k distinct entries of range(n), the same on every machine: a keyed permutation.

    Four Feistel rounds on the smallest even-bit square that holds n, walking the cycle until the
    result lies inside. int64 tensor arithmetic only, so the seed is a portable file format.
    ValueError where there are not so many.
    """
    if k > n:
        raise ValueError(f"{k} distinct entries of {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    salt = zlib.crc32(f"{seed}/{key}".encode())

    def permute(v: Tensor) -> Tensor:
        left, right = v >> half, v & mask
        for r in range(4):
            mixed = (right * 0x9E3779B1 + salt + r * 0x85EBCA6B) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 15)) & mask)
        return (left << half) | right

    v = permute(torch.arange(k, dtype=torch.int64))
    while bool((outside := v >= n).any()):
        v = torch.where(outside, permute(v), v)
    return v


class SparseDelta(Term):
    """``Delta[index // in, index % in] = values``; index (k,) of distinct flat positions.

    portable: the index can be drawn again from a seed, so the file need not hold it.
    counted: k is nobody's to compute: an adapter's config says it.
    narrow: False keeps x whole even where the entries touch few columns: what is kept is then the
    same whatever data chose the entries, and promised before there is any.
    """

    def __init__(self, place: Place, index: Tensor, portable: bool, counted: bool = False,
                 narrow: bool = True):
        super().__init__()
        #: what a file must say so that a load makes the same shapes (engine/attach.py)
        self.counted = {"entries": index.numel()} if counted else None
        self.out, self.inp = place.out, place.inp
        index = index.sort().values
        self.values = nn.Parameter(torch.zeros(index.numel(), device=index.device))
        self.register_buffer("index", index.to(torch.int32) if self.out * self.inp < 2**31
                             else index, persistent=not portable)
        columns = torch.unique(index % self.inp) if not is_fake(index) else index.new_empty(0)
        few = narrow and 0 < columns.numel() <= self.inp // 4
        self.register_buffer("columns", columns if few else None, persistent=False)
        self.tokenwise, self.tiled = few, not few
        self._read = (id(self.index), self.index._version)

    def _rows_cols(self) -> tuple[Tensor, Tensor]:
        index = self.index.long()
        return index // self.inp, index % self.inp

    def standing(self) -> Tensor:
        """What stands at each position of the index; those that train come first."""
        return self.values

    def dense(self) -> Tensor:
        flat = torch.zeros(self.out * self.inp, dtype=self.values.dtype,
                           device=self.values.device)
        return flat.index_put((self.index.long(),), self.standing()).view(self.out, self.inp)

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.index.long(), self.values.detach()

    @property
    def looks(self) -> bool:
        """Does it look at the gradient of whole panels, beside its own entries?"""
        return type(self).pull is not SparseDelta.pull

    # -- few columns: x[:, columns] is all that is read and kept -----------------------------------
    @property
    def keeps_input(self) -> bool:
        return not self.tokenwise                # the narrow form keeps its own columns

    def _columns(self) -> Tensor:
        """The columns that hold entries; read again when a file has brought another index (an
        export, which puts its own tensors there, brings none)."""
        now = id(self.index), self.index._version
        if self._read != now and not torch.compiler.is_exporting():
            self.columns, self._read = torch.unique(self.index.long() % self.inp), now
        return self.columns

    def _narrow(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = self._rows_cols()
        where = torch.searchsorted(self._columns(), cols)
        small = torch.zeros(self.out, self.columns.numel(), dtype=self.values.dtype,
                            device=self.values.device)
        small[rows, where] = self.values.detach()
        return small, rows, where

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        x_NC = x_NI[:, self._columns()]
        y_NO.addmm_(x_NC.to(y_NO.dtype), self._narrow()[0].t().to(y_NO.dtype), alpha=scale)
        return (x_NC,)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        (x_NC,) = kept
        small, rows, where = self._narrow()
        if dx_NI is not None:
            dx_NI[:, self.columns] += (g_NO @ small.to(g_NO.dtype)).mul_(scale)
        found = (g_NO.t() @ x_NC)[rows, where] if self._refused(g_NO, x_NC) else \
            at_entries(g_NO, x_NC, rows, where)
        return [found.mul_(scale).to(self.values.dtype)]

    # -- panels ------------------------------------------------------------------------------------
    def _inside(self, i0: int, i1: int, most: int) -> tuple[Tensor, Tensor, Tensor | slice]:
        """Of the first `most` entries those in columns i0:i1: where in a panel, and which."""
        rows, cols = (at[:most] for at in self._rows_cols())
        if i0 == 0 and i1 == self.inp:
            return rows, cols, slice(None)
        inside = ((cols >= i0) & (cols < i1)).nonzero().squeeze(1)
        return rows[inside], cols[inside] - i0, inside

    @torch.no_grad()
    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        standing = self.standing()
        rows, cols, inside = self._inside(i0, i1, len(standing))
        panel = torch.zeros(self.out, i1 - i0, dtype=self.values.dtype, device=self.values.device)
        panel[rows, cols] = standing[inside]
        return panel

    def road(self) -> str:
        return refusal(self.values, self.index)

    def _refused(self, g_NO: Tensor, x_NI: Tensor) -> bool:
        return bool(self.road() or refusal(g_NO) or refusal(x_NI))

    @torch.no_grad()
    def pull_straight(self, g_NO: Tensor, x_NI: Tensor, scale: float,
                      grads: list[Tensor | None]) -> bool:
        if self.looks or self._refused(g_NO, x_NI):
            return False
        rows, cols = (at[: len(self.values)] for at in self._rows_cols())
        grads[0] = at_entries(g_NO, x_NI, rows, cols).mul_(scale).to(self.values.dtype)
        return True

    @torch.no_grad()
    def pull(self, i0: int, i1: int, G: Tensor, state: object,
             grads: list[Tensor | None]) -> Tensor:
        rows, cols, inside = self._inside(i0, i1, len(self.values))
        if grads[0] is None:
            grads[0] = torch.zeros_like(self.values)
        grads[0][inside] += G[rows, cols].to(self.values.dtype)
        return self.tile(i0, i1, state)


class Few(SparseDelta):
    """A few entries beside what keeps x whole in any case: nothing more is kept, and only their
    columns of it are read. As few as a quarter of the inputs; more of them go by panels."""

    def __init__(self, place: Place, index: Tensor, portable: bool):
        super().__init__(place, index, portable, narrow=False)
        if index.numel() <= self.inp // 4:
            self.tokenwise, self.tiled = True, False
            if not is_fake(self.index):
                self.columns = torch.unique(self.index.long() % self.inp)

    @property
    def keeps_input(self) -> bool:
        return self.values.requires_grad

    def _columns(self) -> Tensor:
        if not simulated(self.index):
            return super()._columns()
        self.columns = self.index.long() % self.inp      # no values: as many as there may be
        return self.columns

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        super().forward_(x_NI, y_NO, scale)
        return ()

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        at = self._columns()
        small, rows, where = self._narrow()
        if dx_NI is not None:
            dx_NI[:, at] += (g_NO @ small.to(g_NO.dtype)).mul_(scale)
        if x_NI is None or not self.values.requires_grad:
            return [None]
        return [(g_NO.t() @ x_NI[:, at])[rows, where].mul_(scale).to(self.values.dtype)]
