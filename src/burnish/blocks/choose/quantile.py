"""Exact order statistics of values that exist only panel by panel.

`torch.quantile` sorts everything and refuses more than 2^24 entries. Here the values stream past:
a small sample brackets the wanted rank, one pass counts what lies below the bracket and collects
what lies inside, and the exact entry is picked from the few collected. When the bracket missed
(it says so by counting) the next one lies beside it; the result is always exact. Values that
move a little between two calls are looked for where they were last (:class:`Near`).

On accelerators, where asking for a count stalls the queue, two histogram passes over the bit
pattern (16 + 15 bits) give the same entries without a sync: positive floats sort like their bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...core.followed import simulated, written_down

Stream = Callable[[], Iterable[Tensor]]

SAMPLE = 1 << 14
#: a bracket that reaches into the first or last 1/EDGE of the sample is extended to that end
EDGE = 32
#: entries the bracket may hold
HELD = 1 << 21
#: bits of a non-negative fp32 that the first histogram counts by, and those left for the second
HIGH, LOW = 16, 15

#: of all values: looked at to each side of the last quantile; farther off, a sample is drawn
CLOSE, FAR = 0.001, 0.015
#: values of a run that is passed over at once; ones that fp32 adds up exactly
RUN, EXACT = 64, 1 << 24


class Near:
    """Where a quantile of values that move was found last, and how far it had moved.

    The next call looks there before it draws a sample: `half` values of the quantile to each side.
    What is found is exact all the same, so two threads may share one.
    """

    __slots__ = ("at", "half")

    def __init__(self) -> None:
        self.at: float | None = None
        self.half = 0.0                          # 0: there is no use in looking there

    def found(self, low: Tensor, values: Tensor, n: int) -> None:
        """`low` was found among these of n values, which lie side by side."""
        at, m = float(low), values.numel()
        one = float(values.amax() - values.amin()) / max(1, m - 1)       # from one to the next
        moved = 0.0 if self.at is None else abs(at - self.at)
        self.at, self.half = at, max(2 * moved, one * n * CLOSE)
        if not self.half <= one * n * FAR:       # also where a value is not a number
            self.half = 0.0


def quantile(stream: Stream, n: int, s: float, sample: Callable[[], Tensor], like: Tensor,
             near: Near | None = None) -> Tensor:
    """The s-quantile (linear interpolation) of n non-negative values, as a 0-d tensor.

    stream: gives the values again, in panels, as often as it is called.
    sample: makes some of the values, where a bracket is looked for; any sample is right, a fair
    one is fast. like: a tensor of their dtype, where they are.
    near: of the same values as they were before; for tensors on the host.
    """
    return between(lambda k: order_statistics(stream, n, k, sample, like, near), n, s)


def between(ranked: Callable[[int], tuple[Tensor, Tensor]], n: int, s: float) -> Tensor:
    """The s-quantile of n values, of which `ranked(k)` gives entries k and k + 1."""
    position = s * (n - 1)
    k = min(int(math.floor(position)), n - 1)
    fraction = position - k
    low, high = ranked(k)
    return low if fraction == 0 else torch.lerp(low, high, fraction)


def order_statistics(stream: Stream, n: int, k: int, sample: Callable[[], Tensor], like: Tensor,
                     near: Near | None = None) -> tuple[Tensor, Tensor]:
    """Entries k and k+1 (from 0, ascending; the last one twice at the end)."""
    if like.device.type != "cpu" and like.dtype == torch.float32:
        return radix(stream, n, k)
    if simulated(like):
        return _traced(stream, n, sample())
    if written_down():                               # a program counts nothing beforehand
        both = torch.cat([p.flatten().clone() for p in stream()]).topk(n - k, sorted=True).values
        return both[-1], both[-1 if k + 1 >= n else -2]
    if near is not None and near.at is not None and near.half:
        below, values = _between(stream, near.at - near.half, near.at + near.half)
        if (pair := _pick(values, k - below, below + values.numel() == n)) is not None:
            near.found(pair[0], values, n)
            return pair
    return bracket(stream, n, k, sample(), near)


def bracket(stream: Stream, n: int, k: int, sample: Tensor,
            near: Near | None = None) -> tuple[Tensor, Tensor]:
    """Sample, count, collect; look beside the bracket when the rank fell outside."""
    sample = sample.flatten()
    m = sample.numel()
    centre = k / max(1, n - 1) * (m - 1)
    # a rank's place in a fair sample of m scatters by sqrt(m)/2, in one of whole rows by more; a
    # second pass costs more than a bracket of some per cent, as long as what it holds is small
    margin = max(3.0 * math.sqrt(m) * math.sqrt(max(1.0, min(k, n - k)) / n) + 8,
                 m * min(0.02, HELD / n / 2))
    a, b = int(centre - margin), int(math.ceil(centre + margin))
    while True:
        # two selections: a sort of the sample takes ten times as long
        lo, hi = _entry(sample, a), _entry(sample, b)
        below, values = _between(stream, lo, hi)
        at = k - below
        if (pair := _pick(values, at, below + values.numel() == n)) is not None:
            if near is not None:
                near.found(pair[0], values, n)
            return pair
        width = 4 * (b - a)
        if at < 0:                                # both ranks, or only k, lie below
            a, b = a - width, (b if at == -1 else a)
        else:
            a, b = (a if at < values.numel() else b), b + width


def _entry(sample: Tensor, k: int) -> float | None:
    """Entry k; None past either end, and for one that is no number (those come last)."""
    if not 0 < k < sample.numel() - 1:
        return None
    value = float(sample.kthvalue(k + 1).values)
    return None if math.isnan(value) else value


def _pick(values: Tensor, at: int, last: bool) -> tuple[Tensor, Tensor] | None:
    """Entries `at` and `at` + 1 of these; None when they are not both among them.

    last: nothing lies above these values."""
    if not (0 <= at < values.numel() and (at + 1 < values.numel() or last)):
        return None
    first = values.kthvalue(at + 1).values
    return first, first if at + 1 >= values.numel() else values.kthvalue(at + 2).values


def _between(stream: Stream, lo: float | None, hi: float | None) -> tuple[int, Tensor]:
    """How many values lie below `lo`, and those from `lo` to `hi`."""
    below, found = 0, []
    for panel in stream():
        flat = panel.flatten()
        if lo is None:
            found.append(flat if hi is None else flat[flat <= hi])
            continue
        # ones and zeros as numbers: several times as fast as truth values to make and to count
        outside = torch.lt(flat, lo, out=torch.empty_like(flat))
        below += sum(int(c.sum()) for c in outside.split(EXACT))
        if hi is not None:
            outside.add_(torch.gt(flat, hi, out=torch.empty_like(flat)))
        found += _picked(flat, outside)
    return below, torch.cat(found)


def _picked(flat: Tensor, outside: Tensor) -> list[Tensor]:
    """Values whose mark is zero. Where they are few, runs without any are passed over."""
    whole = flat.numel() // RUN * RUN
    runs = outside[:whole].view(-1, RUN)
    some = (runs.sum(1) < RUN).nonzero().squeeze(1)
    if 2 * some.numel() > runs.shape[0]:
        return [flat[outside == 0]]
    return [flat[:whole].view(-1, RUN)[some][runs[some] == 0], flat[whole:][outside[whole:] == 0]]


def radix(stream: Stream, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Two histogram passes over fp32 bit patterns, of their high and of their low bits, for both
    ranks at once; no value ever reaches the host."""
    ranks = (k, min(k + 1, n - 1))
    counts = _counted(stream, lambda bits: [(bits >> LOW, None)], 1 << HIGH)
    found = [digit_of(counts[0], rank) for rank in ranks]
    counts = _counted(stream, lambda bits: [(bits & ((1 << LOW) - 1), (bits >> LOW) == high)
                                            for high, _ in found], 1 << LOW)
    low = [digit_of(c, left)[0] for c, (_, left) in zip(counts, found, strict=True)]
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


def digit_of(counts: Tensor, rank: int | Tensor) -> tuple[Tensor, Tensor]:
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
        held.append((flat.new_empty(2, flat.numel()), flat.new_empty(int(flat.numel() * share)))[1])
    del held
    return sample.new_empty(()), sample.new_empty(())
