"""Codes whose groups have 1, 2 or 4 bits a value, by what each group costs (ActNN).

A group of range r that is coded in b bits, rounded at random, has the variance
``s^2 / 6 = r^2 / (6 (2^b - 1)^2)`` per value in the mean over where values lie between two levels.
With room for m bits in the mean, b_g of every group minimises the sum of them:

    min sum_g r_g^2 / (2^b_g - 1)^2      over b_g in {1, 2, 4},      sum_g b_g <= floor(m G)

The gain per bit falls from 1 to 2 to 4 (8/9 r^2, then 4/75 r^2), so taking the best step that is
left until the room is full is the minimum, but for a bit at the end. b_g depends on the values and
not on the rounding, so E[x^] = x whatever it is.

What is held has a size that n and m alone decide, so nothing asks a device how much there is: rows
of group / 8 bytes, one for each bit of each group (bit k of its values), and one that nobody reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import Codes, Part, packed, pieces, unpacked

#: bits that a group may have
CHOICES = (1, 2, 4)


def room(groups: int, mean: float) -> int:
    """Bits of a value, summed over groups."""
    return int(mean * groups + 1e-6)


@torch.no_grad()
def allocated(ranges: Tensor, mean: float) -> Tensor:
    """b (G,) of ranges r (G,), in uint8: 1, 2 or 4 each, and `mean` (1 to 4) or less on average."""
    G = len(ranges)
    square = ranges.double().square()
    cost = [1 / (2 ** b - 1) ** 2 for b in CHOICES]
    steps = [b - a for a, b in zip(CHOICES[:-1], CHOICES[1:], strict=True)]
    gain = torch.cat([square * ((a - b) / n) for a, b, n in
                      zip(cost[:-1], cost[1:], steps, strict=True)])
    order = gain.argsort(descending=True, stable=True)        # of a group the first step first
    size = torch.cat([torch.full((G,), n, device=ranges.device) for n in steps])
    taken = size[order].cumsum(0) <= room(G, mean) - G
    bits = torch.zeros_like(size).index_put((order,), size[order] * taken)
    return (1 + bits.view(len(steps), G).sum(0)).to(torch.uint8)


class Allocated(Codes):
    """Codes of n values, `bits` in the mean. tensors: (rows, least values, steps, bits of each
    group)."""

    @classmethod
    @torch.no_grad()
    def of(cls, part: Part, n: int, bits: Any, group: int, like: Tensor,
           generator: torch.Generator | None, unit: int = 1) -> Allocated:
        """As of :class:`~burnish.blocks.tape.codes.Codes`; `part` is asked twice."""
        wide = torch.promote_types(like.dtype, torch.float32)
        groups, made = -(-n // group), {"dtype": wide, "device": like.device}
        low, step = torch.empty(groups, **made), torch.empty(groups, **made)
        for a, b in pieces(n, unit * group):
            v = _whole(part(a, b).to(wide), group)
            at = slice(a // group, a // group + len(v))
            low[at] = v.amin(1)
            step[at] = v.amax(1) - low[at]
        each = allocated(step, bits)
        step /= (1 << each.int()) - 1
        places = _places(each, bits)
        rows = torch.zeros(room(groups, bits) + 1, group // 8, dtype=torch.uint8,
                           device=like.device)
        for a, b in pieces(n, unit * group):
            v = _whole(part(a, b).to(wide), group)
            at = slice(a // group, a // group + len(v))
            s = step[at].unsqueeze(1)
            u = torch.rand(v.shape, generator=generator, **made)
            q = (v - low[at].unsqueeze(1)).div_(s.masked_fill(s == 0, 1)).add_(u).floor_()
            q = q.clamp_min_(0).minimum((1 << each[at].int()).sub(1).unsqueeze(1)).to(torch.uint8)
            for k in range(CHOICES[-1]):
                rows[places[at, k]] = packed(((q >> k) & 1).view(-1), 1).view(len(v), -1)
        return cls((rows, low, step, each), n, bits, group, like.dtype)

    def part(self, a: int, b: int) -> Tensor:
        rows, low, step, each = self.tensors
        at = slice(a // self.group, -(-b // self.group))
        places = _places(each, self.bits)[at]
        q = torch.zeros(len(places), self.group, dtype=torch.uint8, device=rows.device)
        for k in range(CHOICES[-1]):
            bit = unpacked(rows[places[:, k]].view(-1), 1, q.numel()).view_as(q)
            q |= bit.masked_fill_((each[at] <= k).unsqueeze(1), 0) << k
        v = q.to(step.dtype).mul_(step[at].unsqueeze(1)).add_(low[at].unsqueeze(1))
        return v.view(-1)[:b - a]

    @staticmethod
    def nbytes(n: int, bits: Any, group: int, dtype: torch.dtype) -> int:
        wide, groups = torch.promote_types(dtype, torch.float32).itemsize, -(-n // group)
        return (room(groups, bits) + 1) * (group // 8) + (2 * wide + 1) * groups


def _whole(v: Tensor, group: int) -> Tensor:
    """(groups, group): the last one is filled with its last value."""
    rest = -len(v) % group
    return (torch.cat([v, v[-1:].expand(rest)]) if rest else v).view(-1, group)


def _places(each: Tensor, bits: float) -> Tensor:
    """(G, 4): the row of every bit of a group; that of a bit which it has not is the last."""
    ends = each.long().cumsum(0).unsqueeze(1)
    k = torch.arange(CHOICES[-1], device=each.device)
    return torch.where(k < each.unsqueeze(1), ends - each.unsqueeze(1) + k,
                       room(len(each), bits))
