"""The caching allocator of CUDA, replayed: against a dense reference and its published rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.memory import simulate
from burnish.memory.caching import CachingAllocator, replay, rounded, segment
from burnish.testing.models import tiny

KiB, MiB = 1 << 10, 1 << 20


class Dense:
    """The same rules, written without any index: lists of (start, size, free), searched whole."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list]]] = []
        self.most_allocated = self.most_reserved = 0

    def malloc(self, nbytes: int) -> list:
        size = max(512, (nbytes + 511) // 512 * 512)
        small = size <= MiB
        fits = [(b[1], n, b[0], b, blocks) for n, (kind, blocks) in enumerate(self.segments)
                if kind == small for b in blocks if b[2] and b[1] >= size]
        if fits:
            *_, block, blocks = min(fits, key=lambda f: f[:3])
        else:
            whole = 2 * MiB if small else 20 * MiB if size < 10 * MiB else \
                (size + 2 * MiB - 1) // (2 * MiB) * (2 * MiB)
            block = [0, whole, True]
            blocks = [block]
            self.segments.append((small, blocks))
        left = block[1] - size
        if left >= 512 if small else left > MiB:
            blocks.insert(blocks.index(block) + 1, [block[0] + size, left, True])
            block[1] = size
        block[2] = False
        self.note()
        return block

    def free(self, block: list) -> None:
        block[2] = True
        for _, blocks in self.segments:
            n = 0
            while n + 1 < len(blocks):
                if blocks[n][2] and blocks[n + 1][2]:
                    blocks[n][1] += blocks.pop(n + 1)[1]
                else:
                    n += 1

    def note(self) -> None:
        every = [b for _, blocks in self.segments for b in blocks]
        self.most_allocated = max(self.most_allocated, sum(b[1] for b in every if not b[2]))
        self.most_reserved = max(self.most_reserved, sum(b[1] for b in every))


SIZES = st.one_of(st.integers(1, 4 * KiB), st.integers(1, 2 * MiB), st.integers(MiB, 40 * MiB),
                  st.sampled_from([512, MiB, MiB + 1, 10 * MiB - 512, 10 * MiB, 19 * MiB]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(0, 10**6), st.booleans()), max_size=60))
def test_any_sequence_of_requests_is_served_as_the_dense_rules_serve_it(calls):
    fast, slow, held = CachingAllocator(), Dense(), []
    for size, which, gives_back in calls:
        if gives_back and held:
            a, b = held.pop(which % len(held))
            fast.free(a)
            slow.free(b)
        else:
            held.append((fast.malloc(size), slow.malloc(size)))
            assert held[-1][0][0].size == held[-1][1][1]
    assert fast.most_allocated == slow.most_allocated
    assert fast.most_reserved == slow.most_reserved


@pytest.mark.parametrize(("asked", "block", "given"), [
    (1, 512, 2 * MiB), (512, 512, 2 * MiB), (513, 1024, 2 * MiB), (MiB, MiB, 2 * MiB),
    (MiB + 1, MiB + 512, 20 * MiB), (10 * MiB - 1, 10 * MiB, 10 * MiB),
    (10 * MiB + 1, 10 * MiB + 512, 12 * MiB), (100 * MiB, 100 * MiB, 100 * MiB)])
def test_rounding_and_segments_are_the_published_ones(asked, block, given):
    assert rounded(asked) == block and segment(block) == given


def test_a_remainder_of_up_to_a_mebibyte_is_not_split_off_a_large_block():
    memory = CachingAllocator()
    held = memory.malloc(12 * MiB)
    memory.free(held)
    memory.malloc(11 * MiB)                   # 1 MiB over: the block is given whole
    assert memory.allocated == 12 * MiB
    memory = CachingAllocator()
    memory.free(memory.malloc(12 * MiB))
    memory.malloc(11 * MiB - 512)
    assert memory.allocated == 11 * MiB - 512 and memory.reserved == 12 * MiB


def test_small_and_large_requests_never_share_a_segment():
    memory = CachingAllocator()
    memory.free(memory.malloc(20 * MiB))
    memory.malloc(512)
    assert memory.reserved == 22 * MiB


def test_what_is_freed_is_joined_and_used_again():
    memory = CachingAllocator()
    parts = [memory.malloc(5 * MiB) for _ in range(4)]     # one segment of 20 MiB
    for part in random.Random(0).sample(parts, 4):
        memory.free(part)
    memory.malloc(20 * MiB)
    assert memory.reserved == memory.most_reserved == 20 * MiB


def test_segments_are_kept_so_reserved_is_more_than_ever_lived():
    """Sizes that grow, as in a loop over longer and longer batches."""
    lives = [(n * 16 * MiB, n, n + 1) for n in range(1, 5)]
    figures = replay(lives)
    assert figures.allocated == figures.active == 64 * MiB
    assert figures.reserved == (16 + 32 + 48 + 64) * MiB


def test_what_ends_at_an_event_makes_room_for_what_begins_there():
    assert replay([(4 * MiB, 0, 3), (4 * MiB, 3, 5)]).allocated == 4 * MiB
    assert replay([(4 * MiB, 0, 4), (4 * MiB, 3, 5)]).allocated == 8 * MiB


def test_on_cuda_a_report_says_all_three_and_elsewhere_what_is_allocated():
    model, batch = tiny("llama")
    cuda = simulate(model, "lora", batch, device="cuda")
    assert set(cuda.allocator) == {"allocated", "active", "reserved"}
    assert cuda.peak_bytes <= cuda.allocator["allocated"] <= cuda.allocator["reserved"]
    assert cuda.allocator["reserved"] % (2 * MiB) == 0 and "reserved" in cuda.text()
    cpu = simulate(model, "lora", batch)
    assert cpu.allocator == {"allocated": cpu.peak_bytes} and "reserved" not in cpu.text()
