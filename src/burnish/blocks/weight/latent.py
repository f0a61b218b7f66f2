"""A matrix that trains in full precision and answers in a few bits.

    m, sigma = mean(W), std(W)        w = (W - m) / (sigma + eps)       W^ = sigma Q(w) + m

sigma is the unbiased one. Q is the code of 2^b levels for a normal variable in which each level is
the conditional median of its interval, which makes E|w - Q(w)| least. The gradient passes Q as if
it were the identity, and m and sigma as what they are:

    dW = (sigma / s) G + dsigma (W - m) / ((n - 1) sigma) + dm / n,         s = sigma + eps
    dsigma = <G, Q(w)> - (sigma / s) <G, w>       dm = (1 - sigma / s) sum G

Kept for backward: W itself, which trains. A file that answers holds b bits an entry, m and sigma.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import truncated_normal_
from ..tape.codes import packed, unpacked
from ..tape.functions import once_differentiable, transformed

EPS = 1e-5


@lru_cache(maxsize=8)
def levels(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(2^bits levels v, the 2^bits - 1 borders t between them): t_i = (v_i + v_(i+1)) / 2 and
    v_i = Phi^-1 of the mean of Phi at both ends, 500 rounds from borders of 0."""
    law = NormalDist()
    t = [0.0] * (2 ** bits - 1)
    for _ in range(500):
        ends = [0.0, *(law.cdf(b) for b in t), 1.0]
        v = [law.inv_cdf((a + b) / 2) for a, b in pairwise(ends)]
        t = [(a + b) / 2 for a, b in pairwise(v)]
    return tuple(v), tuple(t)


def _law(W: Tensor) -> tuple[Tensor, Tensor]:
    return W.mean(), W.std()


def _codes(W: Tensor, bits: int, m: Tensor, sigma: Tensor) -> Tensor:
    """Numbers of levels; what lies on a border goes to the upper one."""
    borders = torch.tensor(levels(bits)[1], dtype=W.dtype, device=W.device)
    return torch.bucketize((W - m) / (sigma + EPS), borders, right=True)


def _decoded(codes: Tensor, bits: int, m: Tensor, sigma: Tensor) -> Tensor:
    values = torch.tensor(levels(bits)[0], dtype=m.dtype, device=codes.device)
    return (sigma * values + m)[codes.long()]


class _Quantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(W)
        m, sigma = _law(W)
        return _decoded(_codes(W, bits, m, sigma), bits, m, sigma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        m, sigma = _law(W)
        s, c = sigma + EPS, W - m
        values = torch.tensor(levels(ctx.bits)[0], dtype=W.dtype, device=W.device)
        q = values[_codes(W, ctx.bits, m, sigma)]
        dsigma = (G * q).sum() - (G * c).sum() * sigma / s ** 2
        dm = G.sum() * (1 - sigma / s)
        return G * (sigma / s) + c * (dsigma / ((W.numel() - 1) * sigma)) + dm / W.numel(), None


def quantised(W: Tensor, bits: int) -> Tensor:
    """W^ of a matrix that trains, in its precision; 2^bits values at most."""
    return reference(W, bits) if transformed() else _Quantised.apply(W, bits)


def reference(W: Tensor, bits: int) -> Tensor:
    """The same by autograd: the obvious form, for comparison."""
    v, t = levels(bits)
    m, sigma = W.mean(), W.std()
    w = (W - m) / (sigma + EPS)
    q = sum(((2 * (w >= b).to(w.dtype) - 1) * (v[i + 1] - v[i]) / 2 for i, b in enumerate(t)),
            torch.zeros_like(w))
    return sigma * (w + (q - w).detach()) + m


@torch.no_grad()
def finished(W: Tensor, bits: int) -> dict[str, Tensor]:
    """What a file holds of it: codes, 8 / bits in a byte, and (m, sigma)."""
    m, sigma = _law(W)
    codes = _codes(W, bits, m, sigma)
    return {"codes": packed(codes.to(torch.uint8).flatten(), bits), "law": torch.stack([m, sigma])}


class Stored(nn.Module):
    """A matrix of a file, as :func:`finished` left it: codes (uint8) and law (m, sigma)."""

    def __init__(self, out: int, inp: int, bits: int):
        super().__init__()
        self.shape, self.bits = (out, inp), bits
        self.codes: Tensor
        self.law: Tensor
        self.register_buffer("codes", torch.zeros(-(-out * inp * bits // 8), dtype=torch.uint8))
        self.register_buffer("law", torch.zeros(2))

    def matrix(self) -> Tensor:
        """W^, a temporary."""
        out, inp = self.shape
        codes = unpacked(self.codes, self.bits, out * inp).view(out, inp)
        return _decoded(codes, self.bits, *self.law)


class Latent(nn.Module):
    """A matrix that trains, `weight` (out, in): truncated normal of deviation `std`, cut at two of
    them, or Kaiming-uniform (a = sqrt 5) without one."""

    def __init__(self, out: int, inp: int, bits: int, std: float | None = None):
        super().__init__()
        self.bits, self.weight = bits, nn.Parameter(torch.empty(out, inp))
        if std is None:
            nn.init.uniform_(self.weight, -inp ** -0.5, inp ** -0.5)
        else:
            truncated_normal_(self.weight, std)

    def matrix(self) -> Tensor:
        """W^, differentiable."""
        return quantised(self.weight, self.bits)

    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over."""
        return finished(self.weight, self.bits)
