"""Intrinsic dimension: what is tried, what counts as reached, a landscape whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.fit import figures
from burnish.methods.lifecycle.intrinsic_dimension import IntrinsicDimension, Sweep


def stepped(at, high=1.0, low=0.0):
    """(score, what was asked): `high` from size `at` on."""
    asked = []

    def score(d):
        asked.append(d)
        return high if d is None or d >= at else low

    return score, asked


@pytest.mark.parametrize("words, sizes", [
    ({}, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120]),
    ({"least": 1, "most": 10, "times": 1.5}, [1, 2, 3, 5, 8]),
    ({"least": 3, "most": 81, "times": 3.0}, [3, 9, 27, 81]),
    ({"least": 1, "most": 1000, "times": 10.0}, [1, 10, 100, 1000]),
    ({"least": 7, "most": 7}, [7]), ({"least": 4, "most": 9, "times": 1.1}, [4, 5, 6, 7, 8, 9])])
def test_sizes_rise_by_a_factor_each_once(words, sizes):
    assert IntrinsicDimension(**words).sizes() == sizes


@pytest.mark.parametrize("beyond, tried", [(0, [10, 20, 40, 80]), (1, [10, 20, 40, 80, 160]),
                                           (3, [10, 20, 40, 80, 160, 320, 640])])
def test_the_sweep_ends_past_the_crossing(beyond, tried):
    score, asked = stepped(70)
    found = IntrinsicDimension(beyond=beyond).lifecycle(score=score)
    assert asked == [None, *tried]
    assert (found.reached, found.below) == (80, 40)
    assert found.points == [(d, float(d >= 70)) for d in tried] and found.whole == 1.0


def test_the_gap_is_halved_as_often_as_asked_and_not_below_one():
    score, asked = stepped(70)
    found = IntrinsicDimension(beyond=0, halvings=2).lifecycle(score=score)
    assert asked[5:] == [57, 68] and (found.reached, found.below) == (80, 68)
    assert [d for d, _ in found.points] == [10, 20, 40, 57, 68, 80]
    score, asked = stepped(70)
    found = IntrinsicDimension(beyond=0, halvings=99).lifecycle(score=score)
    assert (found.reached, found.below) == (70, 69)
    score, asked = stepped(1)                            # nothing is below the first
    found = IntrinsicDimension(beyond=0, halvings=9).lifecycle(score=score)
    assert (found.reached, found.below) == (1, None) and len(asked) == len(set(asked))


def test_a_bar_that_nothing_reaches():
    score, asked = stepped(10**9)
    found = IntrinsicDimension(least=2, most=8, halvings=3).lifecycle(score=score)
    assert asked == [None, 2, 4, 8] and found.reached is None and found.below == 8


@pytest.mark.parametrize("whole, share, bar", [(0.8, 0.9, 0.72), (-2.0, 0.9, -2.2), (0.5, 1.0, 0.5),
                                               (-2.0, 0.5, -3.0)])
def test_the_bar_is_a_share_of_what_everything_reaches(whole, share, bar):
    found = Sweep([(1, bar - 1e-6), (2, bar), (3, bar - 1e-6), (4, bar + 1)], whole, share)
    assert found.bar == pytest.approx(bar)
    exact = Sweep([(1, found.bar - 1e-9), (2, found.bar)], whole, share)
    assert exact.reached == 2 and exact.below == 1       # reaching it is enough


def test_the_quadratic_of_ten_constraints_has_dimension_ten():
    """1000 numbers, of each hundred the sum is asked for: solutions are a space of 990."""
    x = torch.block_diag(*[torch.ones(1, 100, dtype=torch.float64)] * 10)
    y = torch.arange(1, 11, dtype=torch.float64).unsqueeze(1)

    def score(d):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1000, 1, bias=False)).double()
        nn.init.normal_(net[0].weight)
        recipe = "full" if d is None else f"said(dimension={d}, projection='dense', scaled=False)"
        tuned = burnish.tune(net, recipe, targets="0", head=False)
        for m in net.modules():
            if hasattr(m, "burnish"):
                m.burnish.double()
        params = list(tuned.parameters())
        assert sum(p.numel() for p in params) == (1000 if d is None else d)
        opt = torch.optim.LBFGS(params, max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
                                line_search_fn="strong_wolfe")

        def loss():
            opt.zero_grad()
            value = (net(x) - y).square().mean()
            value.backward()
            return value

        opt.step(loss)
        return math.exp(-float(loss()))

    found = IntrinsicDimension(least=1, most=64, halvings=9).lifecycle(score=score)
    assert found.whole == pytest.approx(1.0, abs=1e-6)
    assert (found.reached, found.below) == (10, 9)
    assert [d for d, _ in found.points] == sorted({1, 2, 4, 8, 16, 32, 11, 9, 10})
    assert dict(found.points)[8] < 0.5 and dict(found.points)[10] == pytest.approx(1, abs=1e-4)


def test_the_picture():
    told = figures.dimension([(10, 0.2), (20, 0.8), (40, 0.9)], 0.9, 0.81)
    assert told.startswith("<svg") and "random subspace" in told[:300]
    assert figures.dimension([(10, 0.2)], 0.9, 0.81).startswith("<svg")   # never reached
    assert figures.dimension([], 0.9, 0.81) == ""


@pytest.mark.parametrize("words, why", [
    ("least=0", "1 <= least <= most"), ("least=20, most=10", "1 <= least <= most"),
    ("times=1.0", "times above 1"), ("share=0.0", "a share above 0 and up to 1"),
    ("share=1.1", "a share above 0"), ("beyond=-1", "at least 0"), ("halvings=-1", "at least 0")])
def test_settings_are_checked(words, why):
    with pytest.raises(ConfigError, match=why):
        parse(f"intrinsic_dimension({words})")


def test_the_defaults():
    m = parse("intrinsic_dimension")[0]
    assert (m.least, m.most, m.times, m.share, m.beyond, m.halvings) == (10, 10_000, 2.0, 0.9, 1, 0)
    parse("intrinsic_dimension(share=1.0, beyond=0)")
