"""Smoothed importance against the recursion worked by hand."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.choose.score import Smoothed, sensitivity


def test_sensitivity():
    value, grad = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([0.5, 2.0, 7.0])
    assert sensitivity(value, grad).tolist() == [1.0, 6.0, 0.0]


def test_what_is_not_a_number_counts_as_zero():
    got = sensitivity(torch.tensor([1.0, 1.0]), torch.tensor([float("nan"), 2.0]))
    assert got.tolist() == [0.0, 2.0]


def test_half_precision_is_scored_in_fp32():
    got = sensitivity(torch.tensor([3e-3]).bfloat16(), torch.tensor([2e-3]).bfloat16())
    assert got.dtype == torch.float32 and float(got) > 0


def test_the_recursion_by_hand():
    """I' first, then U from the new I'."""
    s = Smoothed(0.5, 0.25)
    s.update(torch.tensor([4.0]))            # I' = 2, U = .75 |4 - 2| = 1.5
    assert (float(s.mean), float(s.spread)) == (2.0, 1.5)
    s.update(torch.tensor([1.0]))            # I' = 1.5, U = .375 + .75 * .5 = .75
    assert (float(s.mean), float(s.spread)) == (1.5, 0.75)
    assert float(s.score()) == 1.125


def test_defaults_follow_the_papers():
    s = Smoothed()
    mean = spread = 0.0
    for value in (3.0, 1.0, 5.0):
        s.update(torch.tensor([value]))
        mean = 0.85 * mean + 0.15 * value
        spread = 0.85 * spread + 0.15 * abs(value - mean)
    assert float(s.score()) == pytest.approx(mean * spread, rel=1e-6)


def test_state_resumes():
    a, b = Smoothed(), Smoothed()
    for _ in range(3):
        a.update(torch.rand(4))
    b.load({k: v.clone() for k, v in a.state().items()})
    more = torch.rand(4)
    a.update(more)
    b.update(more)
    assert torch.equal(a.score(), b.score())


def test_nothing_seen_yet():
    empty = Smoothed()
    assert empty.state() == {}
    with pytest.raises(RuntimeError, match="no importance"):
        empty.score()
    full = Smoothed()
    full.update(torch.ones(2))
    full.load(empty.state())
    assert full.mean is None
