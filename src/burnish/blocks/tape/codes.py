"""Tensors in a few bits: k-bit codes of values, right in the mean, and k-bit indices.

Values go in groups of `group` along memory. A group with least value z and range r is coded on
2^k levels of step ``s = r / (2^k - 1)``:

    q = floor((x - z) / s + u),  u uniform in [0, 1)        x^ = z + s q,  E[x^] = x

so |x^ - x| < s and Var[x^] <= s^2 / 4. Bytes: k/8 per value, and two numbers per group in fp32
(fp64 for fp64 values). What is coded is worked through in pieces, so no temporary is of full size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: values worked on at once
PIECE = 1 << 20
#: part(a, b) -> values a..b of what is coded, flat
Part = Callable[[int, int], Tensor]


def pieces(n: int, unit: int) -> Iterator[tuple[int, int]]:
    """Runs of n values, each but the last a whole number of units."""
    step = max(unit, PIECE // unit * unit)
    return ((a, min(n, a + step)) for a in range(0, n, step))


def packed(q: Tensor, bits: int) -> Tensor:
    """Small whole numbers (uint8, flat), 8/bits in a byte; the last byte is filled with zeros."""
    per = 8 // bits
    if per == 1:
        return q
    if q.numel() % per:
        q = torch.nn.functional.pad(q, (0, per - q.numel() % per))
    q = q.view(-1, per)
    out = q[:, 0].clone()
    for k in range(1, per):
        out |= q[:, k] << (bits * k)
    return out


def unpacked(b: Tensor, bits: int, n: int) -> Tensor:
    """The first n numbers of what :func:`packed` made."""
    per = 8 // bits
    if per == 1:
        return b[:n]
    out = torch.empty(b.numel(), per, dtype=torch.uint8, device=b.device)
    for k in range(per):
        out[:, k] = (b >> (bits * k)) & (2 ** bits - 1)
    return out.view(-1)[:n]


class Codes:
    """k-bit codes of n values. tensors: (codes, least values, steps), what is held."""

    def __init__(self, tensors: tuple[Tensor, ...], n: int, bits: Any, group: int,
                 dtype: torch.dtype):
        self.tensors, self.n, self.bits, self.group, self.dtype = tensors, n, bits, group, dtype

    @classmethod
    @torch.no_grad()
    def of(cls, part: Part, n: int, bits: Any, group: int, like: Tensor,
           generator: torch.Generator | None, unit: int = 1) -> Codes:
        """Codes of the values that `part` gives, piece by piece (pieces are whole in `unit`).

        like: whose device and dtype they have. generator: draws u.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        per, top, groups = 8 // bits, 2 ** bits - 1, -(-n // group)
        codes = torch.empty(-(-n // per), dtype=torch.uint8, device=like.device)
        low, step = (torch.empty(groups, dtype=wide, device=like.device) for _ in range(2))
        for a, b in pieces(n, unit * group):
            v = part(a, b).to(wide)
            rest = -(b - a) % group
            if rest:                                 # the last group: filled with its last value
                v = torch.cat([v, v[-1:].expand(rest)])
            v = v.view(-1, group)
            z, r = v.amin(1), v.amax(1)
            s = (r - z) / top
            at = slice(a // group, a // group + len(s))
            low[at], step[at] = z, s
            u = torch.rand(v.shape, generator=generator, dtype=wide, device=like.device)
            q = (v - z.unsqueeze(1)).div_(s.masked_fill(s == 0, 1).unsqueeze(1))
            q = q.add_(u).floor_().clamp_(0, top).to(torch.uint8)
            codes[a // per:-(-b // per)] = packed(q.view(-1)[:b - a], bits)
        return cls((codes, low, step), n, bits, group, like.dtype)

    def part(self, a: int, b: int) -> Tensor:
        """Values a..b as they are decoded, in the precision of the steps; a begins a group."""
        codes, low, step = self.tensors
        per, group = 8 // self.bits, self.group
        q = unpacked(codes[a // per:-(-b // per)], self.bits, b - a).to(step.dtype)
        if rest := -(b - a) % group:
            q = torch.nn.functional.pad(q, (0, rest))
        at = slice(a // group, -(-b // group))
        v = q.view(-1, group).mul_(step[at].unsqueeze(1)).add_(low[at].unsqueeze(1))
        return v.view(-1)[:b - a]

    @torch.no_grad()
    def values(self) -> Tensor:
        """All of them, flat, in the dtype of what was coded."""
        out = torch.empty(self.n, dtype=self.dtype, device=self.tensors[0].device)
        for a, b in self.runs():
            out[a:b] = self.part(a, b)
        return out

    def runs(self, unit: int = 1) -> Iterator[tuple[int, int]]:
        """What of them is decoded at once: whole units, and what :meth:`part` may be asked for."""
        return pieces(self.n, unit * self.group)

    @staticmethod
    def nbytes(n: int, bits: Any, group: int, dtype: torch.dtype) -> int:
        """Bytes of the codes of n values."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return -(-n // (8 // bits)) + 2 * wide * -(-n // group)
