"""The k lowest of a run, against a sort."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.choose.lowest import lowest


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 4, 6, 7, 8])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_exactly_so_many_of_each_run_of_equal_ones_the_first(k, levels):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(-levels, levels, (3, 5, 7), generator=g).float()
    got = lowest(score, k)
    want = torch.zeros_like(score, dtype=torch.bool)
    order = score.argsort(dim=-1, stable=True)[..., : max(0, k)]
    assert got.dtype == torch.bool and torch.equal(got, want.scatter(-1, order, True))


def test_of_one_alone_one_or_none():
    assert lowest(torch.zeros(2, 1), 1).all() and not lowest(torch.zeros(2, 1), 0).any()


def test_infinities_have_their_place():
    inf = float("inf")
    score = torch.tensor([inf, -inf, 0.0, inf, -inf])
    assert lowest(score, 1).tolist() == [False, True, False, False, False]
    assert lowest(score, 4).tolist() == [True, True, True, False, True]


def test_what_is_given_stays_and_has_no_graph():
    score = torch.tensor([2.0, 1.0, 3.0], requires_grad=True)
    got = lowest(score, 1)
    assert not got.requires_grad and score.tolist() == [2, 1, 3]
