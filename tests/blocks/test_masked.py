"""Weights behind a mask of scores: which entries live, and what passes the mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from burnish.blocks.weight.masked import _Straight, most, straight


@pytest.mark.parametrize("keep", [0, 1, 5, 11, 12])
def test_exactly_so_many_of_the_largest(keep):
    g = torch.Generator().manual_seed(0)
    S = torch.randn(3, 4, generator=g)                       # negative ones among them
    mask = most(S, keep)
    assert mask.shape == (3, 4) and mask.dtype == torch.bool and int(mask.sum()) == keep
    assert set(mask.flatten().nonzero().flatten().tolist()) == \
        set(S.flatten().argsort(descending=True)[:keep].tolist())


def test_of_one_score_one_may_live():
    assert most(torch.zeros(1, 1), 1).all() and not most(torch.zeros(1, 1), 0).any()


@pytest.mark.parametrize("keep, want", [(1, [2]), (2, [2, 0]), (3, [2, 0, 1]), (4, [2, 0, 1, 4]),
                                        (5, [2, 0, 1, 4, 3])])
def test_of_equal_scores_the_first_live(keep, want):
    S = torch.tensor([[1.0, 1.0, 2.0, 0.0, 1.0]])
    assert most(S, keep).flatten().nonzero().flatten().tolist() == sorted(want)


@pytest.mark.parametrize("way", ["function", "transform"])
def test_the_gradient_passes_straight_through(way):
    g = torch.Generator().manual_seed(0)
    W, S, G = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    M = most(S, 7)
    torch.testing.assert_close(straight(W, S, M), W * M)
    if way == "transform":
        dW, dS = torch.func.grad(lambda W, S: (straight(W, S, M) * G).sum(), (0, 1))(W, S)
    else:
        W, S = W.requires_grad_(), S.requires_grad_()
        dW, dS = torch.autograd.grad(straight(W, S, M), [W, S], G)
    torch.testing.assert_close(dW, torch.where(M, G, 0.0))
    torch.testing.assert_close(dS, G * W)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_wanted_is_made(wanted):
    ctx = SimpleNamespace(saved_tensors=(torch.ones(2, 3), torch.ones(2, 3)),
                          needs_input_grad=(*wanted, False))
    made = _Straight.backward(ctx, torch.ones(2, 3))
    assert tuple(t is not None for t in made) == (*wanted, False)


def test_of_the_scores_nothing_is_kept():
    kept = []
    W, S = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        straight(W, S, most(S, 3))
    assert [(t.dtype, t.data_ptr() == W.data_ptr()) for t in kept] == \
        [(torch.float32, True), (torch.bool, False)]
