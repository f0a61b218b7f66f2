"""Runs of the input are summed, then multiplied once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.weight.shards import Shards
from burnish.core.site import Place

INP, OUT, R = 7, 6, 3


def term(width=OUT, **kw):
    torch.manual_seed(0)
    made = Shards(Place("", "weight", "linear", OUT, INP), R, width, **kw).double()
    torch.nn.init.normal_(made.D)
    return made


def written_out(D):
    """Delta[o, i] = D[i mod r, o mod width], entry by entry."""
    return torch.stack([torch.stack([D[i % R, o % D.shape[1]] for i in range(INP)])
                        for o in range(OUT)])


@pytest.mark.parametrize("width", [OUT, 3, 2])
def test_the_update_is_the_tiled_identity_times_d(width):
    t = term(width)
    want = written_out(t.D)
    assert torch.equal(t.dense(), want) and torch.equal(t.tile(2, 5, None), want[:, 2:5])
    A, B = t.factors()
    assert A.shape == (R, INP) and A.dtype == torch.float64
    torch.testing.assert_close(B @ A, want)


@pytest.mark.parametrize("width", [OUT, 3, 2])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_tokens_and_gradients_are_those_of_the_matrix(width, scale, p):
    """With dropout: the mask of the forward, in the backward too."""
    t = term(width, dropout=p)
    x = torch.randn(5, INP, dtype=torch.float64)
    g, y = torch.randn(5, OUT, dtype=torch.float64), torch.zeros(5, OUT, dtype=torch.float64)
    torch.manual_seed(1)
    kept = t.forward_(x, y, scale)
    D, leaf = t.D.detach().clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(1)
    dropped = F.dropout(leaf, p, True) if p else leaf
    want = scale * dropped @ written_out(D).t()
    torch.testing.assert_close(y, want)
    dx = torch.ones_like(x)                              # others have added theirs
    (dD,) = t.backward_(g, None, kept, dx, scale)
    for a, b in zip((dD, dx - 1), torch.autograd.grad(want, (D, leaf), g), strict=True):
        torch.testing.assert_close(a, b)
    gain = t.gain_(g, x, kept, scale)                    # sum_n g (scale Delta drop(x))
    torch.testing.assert_close(gain, (g * want).sum(0).detach())


def test_by_plain_functions_it_is_the_same_and_drops_in_training_alone():
    t = term(3, dropout=0.5)
    x = torch.randn(2, 4, INP, dtype=torch.float64)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5, True)
    torch.manual_seed(1)
    torch.testing.assert_close(t.plain(x), dropped @ written_out(t.D).t())
    t.eval()
    torch.testing.assert_close(t.plain(x), x @ written_out(t.D).t())
    torch.testing.assert_close(term().plain(x), x @ written_out(term().D).t())


def test_without_a_word_nothing_is_dropped():
    t, x = term(), torch.randn(4, INP, dtype=torch.float64)
    y = torch.zeros(4, OUT, dtype=torch.float64)
    t.forward_(x, y, 1.0)
    torch.testing.assert_close(y, x @ written_out(t.D).t())
