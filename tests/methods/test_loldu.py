"""LoLDU: the diagonal of a triangular decomposition trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.between import Diagonal
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.spectral.loldu import ldu
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=4", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"loldu({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Diagonal)
    term.double()
    return model, tuned, term


@pytest.mark.parametrize("shape", [(9, 12), (12, 9), (8, 8)])
def test_the_decomposition_makes_the_weight(shape):
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64)
    L, D, U = ldu(W)
    m = min(shape)
    assert L.shape == (shape[0], m) and D.shape == (m,) and U.shape == (m, shape[1])
    torch.testing.assert_close(L @ torch.diag(D) @ U, W, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(U.diagonal(), torch.ones(m, dtype=W.dtype))
    assert float(L.abs().max()) <= 1 and not U.tril(-1).any()


def test_a_weight_without_pivots_stays_finite():
    W = torch.randn(6, 1, dtype=torch.float64) @ torch.randn(1, 8, dtype=torch.float64)
    L, D, U = ldu(W)
    assert bool(U.isfinite().all()) and int((D != 0).sum()) == 1
    torch.testing.assert_close(L @ torch.diag(D) @ U, W, rtol=1e-10, atol=1e-11)


def test_pivots_below_a_millionth_of_the_largest_are_no_divisors():
    W = torch.eye(4, 5, dtype=torch.float64) * 1000
    W[1, 1], W[2, 2], W[2, 4] = 1.5e-3, 0.5e-3, 7e-4
    L, D, U = ldu(W)
    assert D.tolist() == [1000, 1.5e-3, 0, 1000]
    assert U[2].tolist() == [0, 0, 0.5e-3, 0, 7e-4], "its row is as it is"


@pytest.mark.parametrize("settings, s", [("rank=4", 1.0), ("rank=4, alpha=6", 1.5)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, s):
    model, tuned, term = made(settings)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    L, D, U = ldu(W)
    rest = W - s * L[:, :4] @ torch.diag(D[:4]) @ U[:4]
    with torch.no_grad():
        term.z.add_(torch.randn_like(term.z))
    follows(tuned, lambda x, z: F.linear(
        x, rest + s * L[:, :4] @ torch.diag(z) @ U[:4], bias), [term.z], (5, 3, 12),
        rtol=1e-5, atol=1e-5)                                          # factors are held in fp32


def test_start_count_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "loldu(rank=8)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("loldu(rank=768)")
    place = Place("a", "weight", "linear", 768, 768)
    assert 24 * method.count(place) == 18_432 and method.per_token(place) == 768
    assert type(method).keeps_input is False and keeps_what_it_says("loldu", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_a_rank_beyond_the_diagonal_is_refused():
    with pytest.raises(RankError, match="^loldu: rank 10"):
        made("rank=10")
    assert burnish.parse("loldu")[0].settings() == {"targets": None, "rank": 256, "alpha": None}
