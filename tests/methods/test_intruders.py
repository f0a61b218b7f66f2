"""Intruder dimensions, and what singular values tell of an update."""

from __future__ import annotations

import math

import pytest
import torch

import burnish
from burnish.blocks.weight import spectrum
from burnish.core.errors import ConfigError
from burnish.methods.lifecycle.intruders import Intruders, looked_at


def weight(out, inp, seed=0, values=None):
    g = torch.Generator().manual_seed(seed)
    n = min(out, inp)
    U = torch.linalg.qr(torch.randn(out, n, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(inp, n, generator=g, dtype=torch.float64)).Q
    s = torch.linspace(2, 0.2, n, dtype=torch.float64) if values is None else values
    return U @ torch.diag(s) @ V.t()


def by_hand(W0, W1, k):
    """c_j over all of the base's vectors, by two complete decompositions."""
    U0, U1 = (torch.linalg.svd(W, full_matrices=False)[0] for W in (W0, W1))
    return torch.stack([max((U1[:, j] @ U0[:, i]).abs() for i in range(U0.shape[1]))
                        for j in range(k)])


@pytest.mark.parametrize("out, inp", [(24, 40), (40, 24)])
def test_the_cosines_are_those_of_the_definition(out, inp):
    W0 = weight(out, inp)
    W1 = W0 + 0.5 * weight(out, inp, 3)
    found = spectrum.leading(W0, W1, 5)
    torch.testing.assert_close(found.cosines, by_hand(W0, W1, 5), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(W1)[:5])


def test_all_of_the_bases_directions_count_not_the_leading_ones():
    """A direction that stood last and now leads is no intruder."""
    W0 = weight(20, 30)
    U, s, V = torch.linalg.svd(W0, full_matrices=False)
    W1 = W0 + 5 * torch.outer(U[:, -1], V[-1])
    found = spectrum.leading(W0, W1, 3)
    assert int(found.intruders(0.5).sum()) == 0 and float(found.cosines[0]) > 0.99


def test_the_base_itself_has_none_and_one_strong_random_direction_is_one():
    W0 = weight(64, 80)
    assert int(spectrum.leading(W0, W0).intruders(0.5).sum()) == 0
    g = torch.Generator().manual_seed(5)
    u, v = (torch.nn.functional.normalize(torch.randn(n, generator=g, dtype=torch.float64), dim=0)
            for n in (64, 80))
    found = spectrum.leading(W0, W0 + 20 * torch.outer(u, v))
    assert found.intruders(0.5).tolist() == [True] + [False] * 9
    assert float(found.cosines.min()) >= 1 / math.sqrt(64) - 1e-9


def test_values_that_tie_are_a_space():
    """Equal values have no vectors of their own: turned within their space none intrudes."""
    n, values = 16, torch.tensor([3.0] * 4 + [1.0] * 12, dtype=torch.float64)
    W0 = weight(n, n, values=values)
    noise = 1e-9 * weight(n, n, 9)
    assert float(spectrum.leading(W0, W0 + noise, 8).cosines.min()) > 0.999
    alone = spectrum.BaseSpaces.of(weight(n, n))
    assert alone.space.tolist() == list(range(n))
    assert spectrum.BaseSpaces.of(W0).space.tolist() == [0] * 4 + [1] * 12


@pytest.mark.parametrize("keep", [0.0, 0.75, 1.0])
def test_scaled_they_count_as_often_as_asked(keep):
    W0 = weight(30, 20)
    u, v = torch.randn(30, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    W1 = W0 + torch.outer(u, v)
    made = Intruders(keep=keep).lifecycle({"a": W0, "b": W0, "n": W0[0]},
                                          {"a": W1, "b": W0, "n": W0[0] + 1})
    U, s, V = torch.linalg.svd(W1, full_matrices=False)
    new = by_hand(W0, W1, 10) < 0.5
    assert 1 <= int(new.sum()) <= 2
    want = W1 + (keep - 1) * (U[:, :10][:, new] * s[:10][new]) @ V[:10][new]
    torch.testing.assert_close(made["a"], want, rtol=1e-9, atol=1e-10)
    assert torch.equal(made["b"], W0) and torch.equal(made["n"], W0[0] + 1)
    if keep == 1:
        assert made["a"] is W1
    A, B = spectrum.leading(W0, W1).pair(0.5, keep)
    assert A.shape == (int(new.sum()), 20) and B.shape == (30, int(new.sum()))


def test_weights_stored_the_other_way_are_turned():
    W0 = weight(30, 20)
    W1 = W0 + torch.outer(torch.randn(30, dtype=torch.float64), torch.randn(20).double())
    one = Intruders(keep=0.2).lifecycle({"a": W0}, {"a": W1})["a"]
    two = Intruders(keep=0.2).lifecycle({"a": W0.t()}, {"a": W1.t()},
                                        transposed=lambda name: name == "a")["a"]
    torch.testing.assert_close(two.t(), one, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_compared_is_passed_over():
    W = weight(12, 12)
    base = {"same": W, "shape": W[:4], "whole": torch.ones(3, 3, dtype=torch.int64), "other": W}
    tuned = {"same": W.clone(), "shape": W, "whole": torch.zeros(3, 3, dtype=torch.int64),
             "new": W, "other": W * 1.5}
    (name, found), = looked_at(base, tuned, 3)
    assert name == "other" and found.cosines.shape == (3,)
    (_, found), = looked_at(base, tuned)
    assert found.cosines.shape == (10,)


def test_low_rank_intrudes_and_full_rank_does_not():
    """The finding: an update of one strong direction intrudes, one of the same size spread over all
    directions does not; and the curve over thresholds rises."""
    W0 = weight(48, 48)
    g = torch.Generator().manual_seed(2)
    counts = []
    for r in (1, 4, 48):
        d = torch.randn(48, r, generator=g, dtype=torch.float64) @ torch.randn(
            r, 48, generator=g, dtype=torch.float64)
        counts.append(spectrum.leading(W0, W0 + 6 * d / d.norm()))
    assert [int(c.intruders(0.5).sum() > 0) for c in counts[:2]] == [1, 1]
    points = spectrum.curve([c.cosines for c in counts[:2]], 10)
    assert [t for t, _ in points] == [i / 10 for i in range(1, 10)]
    assert [n for _, n in points] == sorted(n for _, n in points) and points[-1][1] > 0
    assert spectrum.curve([])[0] == (0.05, 0)


def test_ranks_of_spectra():
    one, equal = torch.tensor([3.0, 0.0, 0.0]), torch.full((5,), 2.0)
    assert spectrum.effective_rank(one) == pytest.approx(1) == spectrum.stable_rank(one)
    assert spectrum.effective_rank(equal) == pytest.approx(5) == spectrum.stable_rank(equal)
    assert spectrum.energy_rank(one) == 1 and spectrum.energy_rank(equal, 0.8) == 4
    assert spectrum.energy_rank(equal, 0.81) == 5
    s = torch.tensor([2.0, 1.0])
    p = torch.tensor([2 / 3, 1 / 3])
    assert spectrum.effective_rank(s) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    assert spectrum.stable_rank(s) == pytest.approx(1.25)
    nothing = torch.zeros(3)
    assert spectrum.effective_rank(nothing) == spectrum.stable_rank(nothing) == 0
    assert spectrum.energy_rank(nothing) == 0 == spectrum.stable_rank(torch.empty(0))
    A, B = torch.randn(3, 20, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    torch.testing.assert_close(spectrum.pair_values(A, B), spectrum.values(B @ A)[:3])


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_ranks_are_the_same_at_any_size(size):
    s = torch.tensor([4.0, 2.0, 1.0]) * size
    assert spectrum.stable_rank(s) == pytest.approx(21 / 16)
    assert spectrum.effective_rank(s) == pytest.approx(
        7 / (4 ** (4 / 7) * 2 ** (2 / 7)))
    assert [spectrum.energy_rank(s, share) for share in (0.76, 0.77, 0.95, 0.96)] == [1, 2, 2, 3]
    assert spectrum.energy_rank(s[1:2]) == 1 and spectrum.energy_rank(s[:0]) == 0


def test_a_share_that_is_exactly_held_is_held_whatever_its_rounding():
    assert 0.1 * 3 > 0.3                                     # of ten equal values three
    assert spectrum.energy_rank(torch.ones(10), 0.1 * 3) == 3
    assert spectrum.energy_rank(torch.ones(10), 0.3) == 3


def test_what_ties_is_within_32_roundings_of_the_largest():
    eps = torch.finfo(torch.float64).eps
    for gap, spaces in ((32, [0, 0]), (32.5, [0, 1])):
        W = torch.diag(torch.tensor([1.0, 1 - gap * eps], dtype=torch.float64))
        assert spectrum.BaseSpaces.of(W).space.tolist() == spaces
        assert spectrum.BaseSpaces.of(W * 64).space.tolist() == spaces


def test_no_cosine_is_above_one():
    off = spectrum.BaseSpaces(torch.full((1, 1), 1 + 1e-6), torch.zeros(1, dtype=torch.int64))
    assert off.cosines(torch.ones(1, 1)).tolist() == [1.0]


def test_spaces_at_hand_are_not_made_again():
    W0 = weight(20, 30)
    W1 = W0 + weight(20, 30, 4)
    again = spectrum.leading(None, W1, 4, spaces=spectrum.BaseSpaces.of(W0))
    assert torch.equal(again.cosines, spectrum.leading(W0, W1, 4).cosines)


def test_the_curve_counts_what_is_below_each_threshold():
    found = [torch.tensor([0.05, 0.3], dtype=torch.float64),
             torch.tensor([0.3, 0.95], dtype=torch.float64)]
    assert spectrum.curve(found, 10) == [
        (i / 10, 1 if i <= 3 else 3) for i in range(1, 10)]
    assert {n for _, n in spectrum.curve([])} == {0}


def test_settings():
    assert burnish.parse("intruders")[0].settings() == {
        "targets": None, "leading": 10, "likeness": 0.5, "keep": 0.75}
    for wrong in ("leading=0", "likeness=0.0", "likeness=1.0", "keep=1.1", "keep=-0.1"):
        with pytest.raises(ConfigError, match="^intruders: leading >= 1"):
            burnish.parse(f"intruders({wrong})")
    assert burnish.parse("intruders(leading=1, keep=0.0)")
