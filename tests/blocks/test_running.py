"""Ranges that steps share: the equation in float64, whose range is whose, and what is kept."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.tape.running import Ranges, Running, site, width

D, RUN, T = 10, 4, 13                                # runs of 4, 4 and 2 channels


def draw(seed, scale=1.0):
    torch.manual_seed(seed)
    return torch.randn(T, D, dtype=torch.float64) * scale + torch.arange(D, dtype=torch.float64)


def coded(ranges, x, at=("", 0), bits=8, seed=0):
    flat = x.reshape(-1)
    return Running.on(ranges, at, lambda a, b: flat[a:b], x.numel(), bits, (RUN, x.shape[-1]), x,
                      torch.Generator().manual_seed(seed))


def bounds(x):
    """(lo, hi) per channel, of the run it is in."""
    lo, hi = torch.empty(D, dtype=x.dtype), torch.empty(D, dtype=x.dtype)
    for c in range(D):
        mine = x[:, c // RUN * RUN:(c // RUN + 1) * RUN]
        lo[c], hi[c] = mine.min(), mine.max()
    return lo, hi


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ranges_move_as_the_equation_and_values_are_cut_to_them(bits):
    ranges, lo, hi = Ranges(0.75), None, None
    for step, scale in enumerate((1.0, 3.0, 0.5)):
        x = draw(step, scale)
        m, M = bounds(x)
        lo, hi = (m, M) if lo is None else (0.75 * lo + 0.25 * m, 0.75 * hi + 0.25 * M)
        ranges.begin()
        made = coded(ranges, x, bits=bits).values().view(T, D)
        s = (hi - lo) / (2 ** bits - 1)
        cut = x.minimum(hi).maximum(lo)
        assert bool(((made - cut).abs() < s * (1 + 1e-9)).all())
        levels = (made - lo) / s
        torch.testing.assert_close(levels, levels.round(), atol=1e-9, rtol=0)
    assert bool((cut != draw(2, 0.5)).logical_not().any())


def test_the_mean_of_many_codes_is_the_value_that_was_cut():
    ranges = Ranges(0.9)
    coded(ranges, draw(0))
    ranges.begin()
    x = draw(0, 1.5)
    coded(ranges, x)
    n = 4000
    mean = sum(coded(ranges, x, bits=2, seed=k).values() for k in range(n)).view(T, D) / n
    low, high = (t.repeat_interleave(RUN)[:D] for t in ranges.held["", 0])
    cut = x.minimum(high).maximum(low)
    off = (mean - cut).abs() / ((high - low) / 3 / 2 / math.sqrt(n))
    assert off.max() < 5 and bool((cut != x).any())


def test_a_step_moves_a_site_once_and_each_site_is_its_own():
    ranges = Ranges(0.5)
    coded(ranges, draw(0))
    first = ranges.held["", 0].clone()
    coded(ranges, draw(1, 9.0))                      # once more in the same step
    assert torch.equal(ranges.held["", 0], first)
    coded(ranges, draw(1, 9.0), at=("block", 0))
    assert list(ranges.held) == [("", 0), ("block", 0)]
    ranges.begin()
    coded(ranges, draw(1, 9.0))
    assert not torch.equal(ranges.held["", 0], first)
    wider = torch.randn(5, 3 * D, dtype=torch.float64)
    coded(ranges, wider)                             # another width: it begins again
    assert ranges.held["", 0].shape == (2, 8)


def test_numbers_that_are_not_finite_move_no_range():
    ranges = Ranges(0.5)
    bad = draw(0)
    bad[0, 0] = float("nan")
    coded(ranges, bad)
    ranges.begin()
    coded(ranges, draw(1))                           # the first that is finite begins
    lo, hi = bounds(draw(1))
    torch.testing.assert_close(ranges.held["", 0][0][0], lo[0])
    before = ranges.held["", 0].clone()
    ranges.begin()
    worse = draw(2)
    worse[0, 0], worse[0, 5] = float("inf"), float("nan")
    coded(ranges, worse)
    now = ranges.held["", 0]
    assert now.isfinite().all() and now[1, 0] == before[1, 0] and now[0, 1] == before[0, 1]
    assert now[1, 2] != before[1, 2]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_constant_comes_back_and_bytes_are_those_it_says(bits):
    x = torch.full((7, D), 3.5)
    made = coded(Ranges(0.9), x, bits=bits)
    assert torch.equal(made.values().view(7, D), x) and made.values().dtype == x.dtype
    assert made.tensors[0].nbytes == Running.nbytes(x.numel(), bits, RUN, x.dtype) \
        == math.ceil(70 * bits / 8)
    assert [t.numel() for t in made.tensors[1:]] == [3, 3]


def test_long_tensors_are_coded_in_pieces(monkeypatch):
    from burnish.blocks.tape import codes

    whole = coded(Ranges(0.9), draw(0), bits=8).values()
    monkeypatch.setattr(codes, "PIECE", 8 * D)
    apart = coded(Ranges(0.9), draw(0), bits=8)
    assert len(list(apart.runs())) == 2
    step = apart.tensors[2].max()
    assert bool(((apart.values() - whole).abs() <= step * (1 + 1e-9)).all())


def test_a_state_comes_back():
    ranges, other = Ranges(0.9), Ranges(0.9)
    coded(ranges, draw(0), at=("a.0", 3))
    coded(ranges, draw(1), at=("", 11))
    other.load(ranges.state())
    assert list(other.held) == [("a.0", 3), ("", 11)]
    assert all(torch.equal(other.held[k], t) for k, t in ranges.held.items())


def test_the_rows_of_a_storage():
    x = torch.randn(2, 6, 8)
    assert width(x) == 8 and width(x.view(12, 8)) == 8
    heads = x.view(2, 6, 2, 4).transpose(1, 2)
    assert width(heads) == width(heads.transpose(2, 3)) == 8
    assert width(torch.randn(5)) == 1 and width(torch.randn(4, 6).t().clone(
        memory_format=torch.preserve_format)) == 1
    path, n = site()
    assert site() == (path, n + 1)
