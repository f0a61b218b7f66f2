"""Updates whose blocks are circulant: tokens meet them as products of their Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .path import Path


class Circulant(Path):
    """``Delta = s [C(w_mn)]``, C(w) the (block, block) matrix with w as its first row, every row
    the one above turned by one to the right: ``C(w)_kj = w_((j - k) mod block)``.

    w (out / block, in / block, block). On tokens: the transform of each run of inputs times the
    conjugate of a kernel's, summed over the runs, turned back; block log(block) operations a run
    instead of block^2. Nothing of the weight's size is made.
    """

    def __init__(self, w: Tensor, scale: float):
        super().__init__()
        self.w = nn.Parameter(w)
        self.w.burnish_decay = False                     # type: ignore[attr-defined]
        self.inp, self.scale = w.shape[1] * w.shape[2], scale

    def path(self, h: Tensor) -> Tensor:
        n, b = self.w.shape[1:]
        wide = torch.promote_types(h.dtype, torch.float32)       # no transform of half precision
        X = torch.fft.rfft(h.to(wide).unflatten(1, (n, b)))
        K = torch.fft.rfft(self.w.to(wide) * self.scale).conj()
        Y = X.permute(2, 0, 1) @ K.permute(2, 1, 0)              # (frequencies, N, out / block)
        return torch.fft.irfft(Y.permute(1, 2, 0), n=b).flatten(-2).to(h.dtype)

    def dense(self) -> Tensor:
        b = self.w.shape[-1]
        at = torch.arange(b, device=self.w.device)
        blocks = self.w[:, :, (at - at[:, None]) % b] * self.scale       # (m, n, b, b)
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)
