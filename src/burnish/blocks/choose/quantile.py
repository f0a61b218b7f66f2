"""Exact order statistics of values that exist only panel by panel.

`torch.quantile` sorts everything and refuses more than 2^24 entries. Here the values stream past:
a small sample brackets the wanted rank, one pass counts what lies below the bracket and collects
what lies inside, and the exact entry is picked from the few collected. When the bracket missed
(it says so by counting) the next one lies beside it; the result is always exact.

On accelerators, where asking for a count stalls the queue, two histogram passes over the bit
pattern (16 + 15 bits) give the same entries without a sync: positive floats sort like their bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Stream = Callable[[], Iterable[Tensor]]

SAMPLE = 1 << 14
#: a bracket that reaches into the first or last 1/EDGE of the sample is extended to that end
EDGE = 32
#: entries the bracket may hold
HELD = 1 << 21
#: bits of a non-negative fp32 that the first histogram counts by, and those left for the second
HIGH, LOW = 16, 15


def quantile(stream: Stream, n: int, s: float, sample: Callable[[], Tensor], like: Tensor
             ) -> Tensor:
    """The s-quantile (linear interpolation) of n non-negative values, as a 0-d tensor.

    stream: gives the values again, in panels, as often as it is called.
    sample: makes some of the values, where a bracket is looked for; any sample is right, a fair
    one is fast. like: a tensor of their dtype, where they are.
    """
    position = s * (n - 1)
    k = min(int(math.floor(position)), n - 1)
    fraction = position - k
    low, high = order_statistics(stream, n, k, sample, like)
    return low if fraction == 0 else torch.lerp(low, high, fraction)


def order_statistics(stream: Stream, n: int, k: int, sample: Callable[[], Tensor], like: Tensor
                     ) -> tuple[Tensor, Tensor]:
    """Entries k and k+1 (from 0, ascending; the last one twice at the end)."""
    if like.device.type != "cpu" and like.dtype == torch.float32:
        return radix(stream, n, k)
    if isinstance(like, FakeTensor):
        return _traced(stream, n, sample())
    return bracket(stream, n, k, sample())


def bracket(stream: Stream, n: int, k: int, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Sample, count, collect; look beside the bracket when the rank fell outside."""
    ordered = sample.flatten().sort().values
    m = ordered.numel()
    centre = k / max(1, n - 1) * (m - 1)
    # a rank's place in a fair sample of m scatters by sqrt(m)/2, in one of whole rows by more; a
    # second pass costs more than a bracket of some per cent, as long as what it holds is small
    margin = max(3.0 * math.sqrt(m) * math.sqrt(max(1.0, min(k, n - k)) / n) + 8,
                 m * min(0.02, HELD / n / 2))
    a, b = int(centre - margin), int(math.ceil(centre + margin))
    while True:
        lo = ordered[a] if a > 0 else None
        hi = ordered[b] if b < m - 1 else None
        below, found = 0, []
        for panel in stream():
            flat = panel.flatten()
            if lo is not None:
                inside = flat >= lo
                below += flat.numel() - int(inside.sum())
                if hi is not None:
                    inside &= flat <= hi
                found.append(flat[inside])
            else:
                found.append(flat[flat <= hi] if hi is not None else flat)
        values = torch.cat(found)
        at = k - below
        last = below + values.numel() == n
        if 0 <= at < values.numel() and (at + 1 < values.numel() or last):
            first = values.kthvalue(at + 1).values
            if at + 1 >= values.numel():
                return first, first
            return first, values.kthvalue(at + 2).values
        width = 4 * (b - a)
        if at < 0:                                # both ranks, or only k, lie below
            a, b = a - width, (b if at == -1 else a)
        else:
            a, b = (a if at < values.numel() else b), b + width


def radix(stream: Stream, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Two histogram passes over fp32 bit patterns, of their high and of their low bits, for both
    ranks at once; no value ever reaches the host."""
    ranks = (k, min(k + 1, n - 1))
    counts = _counted(stream, lambda bits: [(bits >> LOW, None)], 1 << HIGH)
    found = [_digit(counts[0], rank) for rank in ranks]
    counts = _counted(stream, lambda bits: [(bits & ((1 << LOW) - 1), (bits >> LOW) == high)
                                            for high, _ in found], 1 << LOW)
    low = [_digit(c, left)[0] for c, (_, left) in zip(counts, found, strict=True)]
    first, second = (((high << LOW) + digit).to(torch.int32).view(torch.float32)
                     for (high, _), digit in zip(found, low, strict=True))
    return first, second


def _counted(stream: Stream, digits: Callable[[Tensor], list[tuple[Tensor, Tensor | None]]],
             size: int) -> list[Tensor]:
    """How often each digit occurs, of what is not left out: a histogram for each pair that
    `digits` makes of some bit patterns (digits, which of them count)."""
    counts: list[Tensor] = []
    for panel in stream():
        for j, (digit, which) in enumerate(digits(panel.flatten().view(torch.int32))):
            if j == len(counts):
                counts.append(torch.zeros(size, dtype=torch.int64, device=panel.device))
            one = torch.ones_like(digit, dtype=torch.int64) if which is None else which.long()
            counts[j].scatter_add_(0, digit.long(), one)
    return counts


def _digit(counts: Tensor, rank: int | Tensor) -> tuple[Tensor, Tensor]:
    """(the digit of the entry of this rank, its rank among those with that digit)."""
    running = counts.cumsum(0)
    digit = (running <= rank).sum()
    # (indexed by a tensor of one number, `running` would ask the device for it)
    before = running.gather(0, (digit - 1).clamp(min=0).unsqueeze(0)).squeeze(0)
    return digit, rank - torch.where(digit > 0, before, 0)


def _traced(stream: Stream, n: int, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The same allocations on fake tensors, where no count exists."""
    m = sample.numel()
    share = min(1.0, (3.0 * math.sqrt(m) + 8) * 2 / m)
    held = []
    for panel in stream():
        flat = panel.flatten()
        held.append((flat >= flat[:1], flat.new_empty(int(flat.numel() * share)))[1])
    del held
    return sample.new_empty(()), sample.new_empty(())
