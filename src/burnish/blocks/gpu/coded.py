"""A frozen matrix in the form that it is held in, of which products decode a tile at a time.

``y = x W^T + b`` and ``dx = g W`` with W in NF4 (:mod:`~burnish.blocks.weight.quantise`), or in
another precision than the tokens': no (out, in) tensor of the decoded weight exists, each program
decodes the tile it multiplies. Where W has to be added to before the product, panels of it are
decoded. Values are those of ``decode()``: rounded to the dtype the module has, then to the tokens'.

Triton's kernels alone (coded_kernels.py): who has no use for them asks a provider for its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .road import blocks, interpreted, launch


class Coded:
    """An (out, in) matrix: entry (o, i) is number ``start + o so + i si`` of what is held.

    codes: what is held: numbers in any precision, or the bytes of NF4 in its flattened order; then
    absmax, top and offset as in Nf4Tensor, and its tables. held: the dtype that decoding gives;
    dtype: the one that this stands for (``to``).
    """

    def __init__(self, codes: Tensor, shape: tuple[int, int], held: torch.dtype,
                 absmax: Tensor | None = None, top: Tensor | None = None,
                 offset: Tensor | None = None, levels: Tensor | None = None,
                 dynamic: Tensor | None = None):
        self.codes, self.absmax, self.top, self.offset = codes, absmax, top, offset
        self.levels, self.dynamic = levels, dynamic
        self.held = self.dtype = held
        self.shape, self.start = torch.Size(shape), 0
        self.strides: tuple[int, int] = (shape[1], 1)
        if absmax is None:
            self.strides = (codes.stride(0), codes.stride(1))

    # -- views: as of a tensor --------------------------------------------------------------------
    def _view(self, **changed: Any) -> Coded:
        new = object.__new__(Coded)
        new.__dict__.update(self.__dict__, **changed)
        return new

    def to(self, dtype: torch.dtype) -> Coded:
        return self._view(dtype=dtype)

    def t(self) -> Coded:
        return self._view(shape=torch.Size(self.shape[::-1]), strides=self.strides[::-1])

    def transpose(self, a: int, b: int) -> Coded:
        return self.t()

    def __getitem__(self, index: Any) -> Coded:
        """``[..., i0:i1]`` and ``[..., o0:o1, :]``, as a place and panels ask."""
        rows, columns = (slice(None), slice(None), *index[1:])[-2:]
        (o0, o1, _), (i0, i1, _) = (s.indices(n) for s, n in
                                    zip((rows, columns), self.shape, strict=True))
        return self._view(start=self.start + o0 * self.strides[0] + i0 * self.strides[1],
                          shape=torch.Size((o1 - o0, i1 - i0)))

    # -- products ---------------------------------------------------------------------------------
    @property
    def form(self) -> int:
        return 0 if self.absmax is None else 1 if self.offset is None else 2

    def _arguments(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[int, ...], dict]:
        """(tensors, the places of entries, constants) as the kernels take them."""
        from . import coded_kernels

        none = self.codes                        # a pointer that this form does not follow
        tensors = tuple(none if t is None else t for t in (
            self.codes, self.absmax, self.top, self.offset, self.dynamic, self.levels))
        so, si = self.strides
        even = self.form > 0 and si == 1 and so % 64 == 0 and self.start % 64 == 0
        name = str(self.held).partition(".")[2]
        return tensors, (so, si, self.start), {
            "FORM": self.form, "EVEN": even, "HELD": getattr(coded_kernels.tl, name),
            "INTERPRETED": interpreted()}

    def linear(self, x: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
        """``x W^T + b``, x (N, in) of any strides; wide: in fp32, as it is accumulated."""
        from . import coded_kernels as kernels

        (N, inp), out = x.shape, self.shape[0]
        y = x.new_empty(N, out, dtype=torch.float32 if wide else x.dtype)
        tensors, places, constants = self._arguments(x.dtype)
        NB, OB = blocks(N, 64), 64
        launch(kernels.forward, -(-N // NB) * -(-out // OB), x, *tensors,
               x if bias is None else bias.contiguous(), y, N, out, inp, *x.stride(), *places,
               BIAS=bias is not None, NB=NB, OB=OB, IB=64, num_stages=2, **constants)
        return y

    def back(self, g: Tensor) -> Tensor:
        """``g W``, g (N, out) of any strides."""
        from . import coded_kernels as kernels

        (N, out), inp = g.shape, self.shape[1]
        dx = g.new_empty(N, inp)
        tensors, places, constants = self._arguments(g.dtype)
        NB = blocks(N, 64)
        launch(kernels.backward, -(-N // NB) * -(-inp // 64), g, *tensors, dx, N, out, inp,
               *g.stride(), *places, NB=NB, OB=64, IB=64, num_stages=2, **constants)
        return dx

    def decode(self, out: Tensor | None = None) -> Tensor:
        """The matrix, dense, of `dtype`; into `out` (contiguous) and in its dtype if given."""
        from . import coded_kernels as kernels

        w = out
        if w is None:
            w = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        tensors, places, constants = self._arguments(w.dtype)
        launch(kernels.decode, -(-self.shape[0] // 32) * -(-self.shape[1] // 64), *tensors, w,
               *self.shape, *places, OB=32, IB=64, **constants)
        return w
