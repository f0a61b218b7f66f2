"""Sums and truncations of factor pairs against the dense matrices."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight.factor_algebra import Factors, cat, inner, linear, merge, svd, truncate
from burnish.core.errors import ConfigError


def pair(seed, rank=4, out=12, inp=9, scale=2.0, lead=(), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(*lead, rank, inp, generator=g, dtype=dtype),
                   torch.randn(*lead, out, rank, generator=g, dtype=dtype), scale)


def dense(pairs, weights):
    return sum(w * p.scale * p.B.double() @ p.A.double()
               for w, p in zip(weights, pairs, strict=True))


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_cat_is_the_sum(lead):
    pairs = [pair(i, rank=r, scale=s, lead=lead) for i, (r, s) in enumerate([(2, 1.0), (5, 0.5)])]
    got = cat(pairs, [0.7, -1.3])
    want = dense(pairs, [0.7, -1.3])
    assert got.rank == 7 and got.scale == 1
    assert (got.dense() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_svd_is_the_truncated_dense_one(rank, lead):
    pairs = [pair(i, rank=4, lead=lead) for i in range(2)]
    want = dense(pairs, [1.0, 0.3])
    S = torch.linalg.svdvals(want)
    least = S[..., rank:].square().sum(-1).sqrt()
    got = svd(pairs, [1.0, 0.3], rank)
    error = torch.linalg.matrix_norm(got.dense().double() - want)
    assert got.rank == rank
    assert ((error - least).abs() <= 1e-5 * torch.linalg.matrix_norm(want)).all()


def test_linear_differs_from_the_sum_by_the_cross_terms():
    one, two = pair(0, dtype=torch.float64), pair(1, dtype=torch.float64, scale=0.5)
    w = [0.6, 0.9]
    got = linear([one, two], w).dense()
    c = [(x * p.scale) ** 0.5 for x, p in zip(w, (one, two), strict=True)]
    cross = c[0] * c[1] * (one.B @ two.A + two.B @ one.A)
    assert torch.allclose(got - dense([one, two], w), cross, rtol=1e-12, atol=1e-12)
    assert cross.norm() > 1


def test_linear_signs_and_ranks():
    p = pair(0)
    assert torch.allclose(linear([p], [-0.5]).dense(), -0.5 * p.dense(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"equal ranks, got \[4, 5\]"):
        linear([p, pair(1, rank=5)])


def test_a_rank_that_is_not_there_is_filled_with_zeros():
    p = pair(0, rank=3)
    got = truncate(p, 6)
    assert got.rank == 6 and torch.allclose(got.dense(), p.dense(), atol=1e-5)


def test_scaling_inner_products_and_names():
    one, two = pair(0), pair(1, rank=2)
    assert torch.allclose((0.5 * one).dense(), 0.5 * one.dense())
    want = (one.dense().double() * two.dense().double()).sum()
    assert inner(one, two).item() == pytest.approx(want.item(), rel=1e-5)
    assert merge("auto", [one, two]).rank == 6
    wide = [pair(i, rank=70, out=80, inp=90) for i in range(2)]
    assert merge("auto", wide).rank == 70 and merge("svd", wide, rank=9).rank == 9
    with pytest.raises(ConfigError, match="'cat', 'linear', 'svd'"):
        merge("ties", [one])
    with pytest.raises(ConfigError, match="different matrices"):
        cat([one, pair(2, out=13)])
    with pytest.raises(ConfigError, match="2 adapters and 1 weights"):
        cat([one, two], [1.0])
    with pytest.raises(ConfigError, match="nothing to merge"):
        cat([])
