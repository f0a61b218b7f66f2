"""Golomb codes of gaps: what goes in comes out, in the bits that the formula says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.blocks.weight import golomb


def back(unary, rest, b, count, n):
    out = torch.zeros(n)
    for at, signs in golomb.decode(unary, rest, b, count):
        assert (out[at] == 0).all()
        out[at] = signs.float()
    return out


@given(st.integers(1, 400), st.floats(0.0, 1.0), st.integers(0, 9), st.integers(0, 1000),
       st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_signs_and_places_come_back(n, share, b, seed, piece):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * (torch.rand(n, generator=g) < share)
    unary, rest, count = golomb.encode(x.split(piece), b)
    assert count == int((x != 0).sum())
    assert torch.equal(back(unary, rest, b, count, n), x.sign())


def test_pieces_of_the_streams_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g) * (torch.rand(20_000, generator=g) < 0.1)
    whole = golomb.encode([x], 3)
    monkeypatch.setattr(golomb, "CODED", 37)
    monkeypatch.setattr(golomb, "READ", 5)
    cut = golomb.encode(x.split(999), 3)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])
    assert torch.equal(back(*cut[:2], 3, cut[2], len(x)), x.sign())


def test_the_published_figures():
    assert golomb.parameter(0.05) == 4
    assert golomb.bits_per_gap(0.05) == pytest.approx(5.786, abs=5e-4)
    assert golomb.entropy(0.05) == pytest.approx(0.336, abs=5e-4)
    assert 0.05 * (golomb.bits_per_gap(0.05) + 1) == pytest.approx(0.339, abs=5e-4)
    for density, bits in ((0.1, 0.569), (0.2, 0.922), (0.5, 1.5)):
        assert golomb.entropy(density) == pytest.approx(bits, abs=5e-4)
    assert golomb.entropy(1.0) == 1.0 and golomb.entropy(0.0) == 0.0


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
def test_b_is_the_best_one_and_the_size_is_the_formulas(density):
    n = 300_000
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=g) * (torch.rand(n, generator=g) < density)
    size = {b: 8 * sum(t.numel() for t in golomb.encode([x], b)[:2]) for b in range(9)}
    best = golomb.parameter(density)
    assert size[best] <= 1.01 * min(size.values())
    want = density * (golomb.bits_per_gap(density) + 1)
    assert size[best] / n == pytest.approx(want, rel=0.02)
    assert size[best] / n > golomb.entropy(density) * 0.99
    assert golomb.parameter(1.0) == 0 and golomb.bits_per_gap(1.0) == 1


def test_a_stream_that_is_cut_says_so():
    x = torch.ones(1000)
    unary, rest, count = golomb.encode([x], 2)
    for short in ((unary[:10], rest), (unary, rest[:10])):
        with pytest.raises(ValueError, match="of 1000"):
            list(golomb.decode(*short, 2, count))
    with pytest.raises(ValueError, match="1000 entries of 999"):
        list(golomb.decode(unary, rest, 2, 999))
    assert math.isclose(sum(len(a) for a, _ in golomb.decode(unary, rest, 2, count)), 1000)
