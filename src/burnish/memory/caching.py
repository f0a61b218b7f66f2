"""The caching allocator of CUDA, replayed from the lives of a step's storages.

PyTorch asks the driver for segments, cuts blocks out of them and keeps what is freed. Three figures
follow, which the world quotes side by side:

    allocated   bytes of blocks in use (``torch.cuda.max_memory_allocated``)
    active      the same, and blocks freed that another stream may still read; with one stream equal
    reserved    bytes of segments (``torch.cuda.max_memory_reserved``): what the driver gave

Its rules, as the comments of ``c10/cuda/CUDACachingAllocator.cpp`` and the notes on memory
management in PyTorch's documentation give them (default settings):

- a request is rounded up to a multiple of 512 B;
- requests up to 1 MiB are served from one pool, larger ones from another; they never mix;
- the smallest free block that holds the request is taken, the lowest address among equals;
- it is split where enough is left over: 512 B or more in the small pool, more than 1 MiB in the
  large one; otherwise the request gets the whole block (and all of it counts as allocated);
- without such a block a segment is asked for: of 2 MiB for requests up to 1 MiB, of 20 MiB for
  those under 10 MiB, else of the request rounded up to 2 MiB;
- a freed block joins free neighbours of its segment; segments are kept.

What is not replayed: a driver that has no more to give (then cached segments are given back),
several streams, ``expandable_segments``, and what a process did before the step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MiB = 1 << 20
#: the unit of a request; the largest request of the small pool, and what a large remainder exceeds
BLOCK, SMALL = 512, MiB
#: segments: of the small pool, of middling requests, the least large request, its rounding
SMALL_SEGMENT, LARGE_SEGMENT, LARGE, ROUND = 2 * MiB, 20 * MiB, 10 * MiB, 2 * MiB


class _Block:
    """A stretch of a segment; neighbours are linked so that free ones can be joined."""

    __slots__ = ("at", "size", "free", "before", "after")

    def __init__(self, at: int, size: int, before: _Block | None = None,
                 after: _Block | None = None):
        self.at, self.size, self.free = at, size, False
        self.before, self.after = before, after


class _Pool:
    """Free blocks of one kind, smallest first, lowest address among equals."""

    def __init__(self, small: bool):
        self.least = BLOCK if small else SMALL + 1    # a remainder of this size is split off
        self.order: list[tuple[int, int]] = []
        self.free: dict[int, _Block] = {}

    def put(self, block: _Block) -> None:
        block.free = True
        insort(self.order, (block.size, block.at))
        self.free[block.at] = block

    def drop(self, block: _Block) -> None:
        del self.order[bisect_left(self.order, (block.size, block.at))]
        del self.free[block.at]
        block.free = False

    def take(self, size: int) -> _Block | None:
        k = bisect_left(self.order, (size, -1))
        if k == len(self.order):
            return None
        block = self.free.pop(self.order.pop(k)[1])
        block.free = False
        return block


class CachingAllocator:
    """``malloc(bytes)`` gives a handle, ``free(handle)`` takes it back.

    allocated, reserved: bytes now; most_allocated, most_reserved: the most there ever were.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._pools = _Pool(small=True), _Pool(small=False)
        self._next = 0                        # addresses of new segments go up

    def malloc(self, nbytes: int) -> tuple[_Block, _Pool]:
        size = rounded(nbytes)
        pool = self._pools[size > SMALL]
        block = pool.take(size)
        if block is None:
            whole = segment(size)
            block = _Block(self._next, whole)
            self._next += whole + ROUND       # segments are never neighbours
            self.reserved += whole
            self.most_reserved = max(self.most_reserved, self.reserved)
        if block.size - size >= pool.least:
            rest = _Block(block.at + size, block.size - size, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            pool.put(rest)
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block, pool

    def free(self, handle: tuple[_Block, _Pool]) -> None:
        block, pool = handle
        self.allocated -= block.size
        before, after = block.before, block.after
        if after is not None and after.free:
            pool.drop(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        if before is not None and before.free:
            pool.drop(before)
            before.size += block.size
            before.after = block.after
            if before.after is not None:
                before.after.before = before
            block = before
        pool.put(block)


def rounded(nbytes: int) -> int:
    """A request as the allocator counts it."""
    return max(BLOCK, -(-nbytes // BLOCK) * BLOCK)


def segment(size: int) -> int:
    """What is asked of the driver for a (rounded) request that no free block holds."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND


@dataclass(frozen=True)
class Figures:
    """The most there ever was, in bytes, by what is counted."""

    allocated: int
    active: int
    reserved: int


def replay(lives: Iterable[tuple[int, int, int]]) -> Figures:
    """Peaks of ``(bytes, first event, one past the last event)`` in the order of their births.

    At an event what has ended is freed before what begins is asked for, as the ledger's events are
    operators: an operator's results are made while its inputs live.
    """
    born: dict[int, list[int]] = {}
    dead: dict[int, list[int]] = {}
    sizes: list[int] = []
    for n, (nbytes, birth, death) in enumerate(lives):
        sizes.append(nbytes)
        born.setdefault(birth, []).append(n)
        dead.setdefault(death, []).append(n)
    allocator = CachingAllocator()
    held: dict[int, tuple[_Block, _Pool]] = {}
    for event in sorted({*born, *dead}):
        for n in dead.get(event, ()):
            if n in held:
                allocator.free(held.pop(n))
        for n in born.get(event, ()):
            held[n] = allocator.malloc(sizes[n])
    return Figures(allocator.most_allocated, allocator.most_allocated, allocator.most_reserved)
