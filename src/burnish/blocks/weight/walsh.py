"""Randomised Walsh-Hadamard turns: ``R = diag(+-1) H / sqrt(n)``, orthogonal, in O(n log n).

H (n, n) has entries of +-1 and ``H H^T = n I``. n = 2^a m with m one, or the order of a Hadamard
matrix of Paley's (12, 20, 28, 36, 44 ...): ``H = H_m x H_2 x .. x H_2``. Where n is not of that
form (11008 = 256 * 43) blocks of the largest power of two that divides n turn by themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: largest order of a factor that is held as a matrix
FACTOR = 64


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = 1 where i - j is a square modulo the prime q, -1 where it is none, 0 at i = j."""
    squares = {k * k % q for k in range(1, q)}
    row = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, q))])
    index = torch.arange(q)
    return row[(index[:, None] - index[None, :]) % q]


def paley(m: int) -> Tensor | None:
    """A Hadamard matrix of order m by Paley's first or second construction over a prime field, in
    fp32; None where they have none."""
    if m % 4:
        return None
    if _prime(q := m - 1) and q % 4 == 3:
        S = torch.zeros(m, m)
        S[0, 1:], S[1:, 0], S[1:, 1:] = 1.0, -1.0, _jacobsthal(q)
        return S + torch.eye(m)
    if _prime(q := m // 2 - 1) and q % 4 == 1:
        C = torch.zeros(q + 1, q + 1)
        C[0, 1:], C[1:, 0], C[1:, 1:] = 1.0, 1.0, _jacobsthal(q)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0],
                                                                             [-1.0, -1.0]])
        return torch.kron(C, plus) + torch.kron(torch.eye(q + 1), minus)
    return None


def order(n: int) -> tuple[int, int]:
    """(m, 2^a): the sizes of a block, which their product is; it divides n."""
    power = n & -n
    odd, m = n // power, 1
    while odd > 1 and m < power:
        m *= 2
        if m * odd <= 512 and paley(m * odd) is not None:
            return m * odd, power // m
    return 1, power


def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of a power of two, in fp32."""
    H = torch.ones(1, 1)
    while H.shape[0] < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


class Walsh(nn.Module):
    """``x -> x R`` for rows x (..., n), and back. seed: of the signs, which are the same for all
    rows of one width."""

    def __init__(self, n: int, seed: int = 0):
        super().__init__()
        base, power = order(n)
        sizes = [base] if base > 1 else []
        while power > 1:
            sizes.append(min(power, FACTOR))
            power //= sizes[-1]
        self.sizes, self.length = sizes, math.prod(sizes)
        signs = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed))
        # made again by whoever loads: no file has them
        self.register_buffer("signs", (2 * signs - 1).to(torch.int8), persistent=False)
        for k, size in enumerate(sizes):
            made = paley(size) if k == 0 and base > 1 else sylvester(size)
            self.register_buffer(f"H{k}", made.to(torch.int8), persistent=False)

    def _product(self, x: Tensor, forth: bool) -> Tensor:
        h = x.reshape(-1, *self.sizes)
        for k in range(len(self.sizes)):
            H = self._buffers[f"H{k}"].to(x.dtype)
            h = (h.movedim(k + 1, -1) @ (H if forth else H.t())).movedim(-1, k + 1)
        return h.reshape(x.shape) * self.length**-0.5

    def turn(self, x: Tensor) -> Tensor:
        """``x R``."""
        return self._product(x * self.signs.to(x.dtype), True)

    def back(self, x: Tensor) -> Tensor:
        """``x R^T``."""
        return self._product(x, False) * self.signs.to(x.dtype)
