"""Cubic schedules and capped shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.blocks.choose.budget import allocate, cubic, elbow

LAYERS = st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1e6)), min_size=1, max_size=12)


@given(start=st.floats(-1e6, 1e6), end=st.floats(-1e6, 1e6), begin=st.floats(0, 100),
       length=st.floats(1, 1000))
def test_cubic_is_monotone_and_keeps_its_ends(start, end, begin, length):
    finish = begin + length
    values = [cubic(start, end, begin - 1 + k * (length + 2) / 40, begin, finish)
              for k in range(41)]
    down = [(b - a) * (1 if end >= start else -1) for a, b in zip(values, values[1:], strict=False)]
    assert min(down) >= -1e-6
    assert cubic(start, end, begin, begin, finish) == start
    assert cubic(start, end, finish, begin, finish) == end
    assert cubic(start, end, begin - 5, begin, finish) == start
    assert cubic(start, end, finish + 5, begin, finish) == end


def test_cubic_by_hand():
    """100 to 20 over 10 steps: 20 + 80 (1 - t/10)^3."""
    got = [cubic(100, 20, t, 0, 10) for t in (0, 2, 5, 8, 10)]
    assert got == pytest.approx([100, 20 + 80 * 0.512, 30, 20 + 80 * 0.008, 20])


def test_a_schedule_without_length_is_a_step():
    assert cubic(5, 1, 3, 3, 3) == 5
    assert cubic(5, 1, 4, 3, 3) == 1


@settings(max_examples=300, deadline=None)
@given(layers=LAYERS, share=st.floats(0, 1.5))
def test_shares_sum_exactly_and_keep_their_caps(layers, share):
    """Sums beyond 2^24 (and 2^53 in all) are whole numbers; zero scores are legal."""
    caps, scores = [c for c, _ in layers], [s for _, s in layers]
    total = int(share * sum(caps))
    got = allocate(total, scores, caps)
    assert all(isinstance(v, int) and 0 <= v <= c for v, c in zip(got, caps, strict=True))
    assert sum(got) == min(total, sum(caps))


@settings(max_examples=200, deadline=None)
@given(layers=st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-3, 1e3)), min_size=2,
                       max_size=8), share=st.floats(0.01, 0.99))
def test_shares_are_proportional_among_those_below_their_caps(layers, share):
    caps, scores = [c for c, _ in layers], [s for _, s in layers]
    total = int(share * sum(caps))
    got = allocate(total, scores, caps)
    below = [i for i, c in enumerate(caps) if got[i] < c - 1]
    spent = sum(got[i] for i in below)
    whole = sum(scores[i] for i in below)
    for i in below:
        assert abs(got[i] - spent * scores[i] / whole) <= len(caps) + 1e-9 * spent
        for j, c in enumerate(caps):            # who is full deserves at least as much
            if got[j] == c:                     # (to the entry that rounding gives)
                assert (c - 1) / scores[j] <= (got[i] + len(caps)) / scores[i] * (1 + 1e-6)


def test_equal_scores_share_equally_until_the_caps():
    assert allocate(30, [1, 1, 1], [100, 100, 100]) == [10, 10, 10]
    assert allocate(30, [1, 1, 1], [4, 100, 100]) == [4, 13, 13]
    assert allocate(30, [0, 0, 0], [100, 100, 100]) == [10, 10, 10]


def test_proportion_by_hand():
    assert allocate(100, [1, 3, 6], [1000, 1000, 1000]) == [10, 30, 60]
    assert allocate(100, [1, 3, 6], [1000, 1000, 40]) == [15, 45, 40]


def test_layers_without_a_score_come_last():
    assert allocate(10, [0, 1, 0], [100, 100, 100]) == [0, 10, 0]
    assert allocate(150, [0, 1, 0], [100, 100, 100]) == [50, 100, 0]


def test_large_sums_are_exact():
    """85 million entries in layers of a vision transformer: fp32 sums would miss some."""
    caps = [768 * 768] * 48 + [768 * 3072] * 24
    total = sum(caps) - 12_345_679
    got = allocate(total, [1.0 + i / 7 for i in range(72)], caps)
    assert sum(got) == total > 2**24


@pytest.mark.parametrize("curve, bend", [
    ([9.0, 1.0, 0.5, 0.0], 2), ([5.0, 4.9, 4.8, 0.5, 0.0], 3), ([3.0, 2.0], 2), ([3.0], 1),
    ([4.0, 3.0, 2.0, 1.0], 4), ([9.0, 1.0, 0.9], 2), ([4e-8, 1e-8, 0.0], 2),
    ([0.7, 0.6, 0.5, 0.4, 0.3], 5), ([5.0, 4.9, 4.8, 4.7, 0.0], 4), ([4.0, 2.8, 1.9, 1.0], 2)])
def test_the_bend_of_a_curve(curve, bend):
    assert elbow(torch.tensor(curve)) == bend
