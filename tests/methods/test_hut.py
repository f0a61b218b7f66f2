"""HUT: the weight times one plus a thin product, entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.ofw.hut import Weighed
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3, alpha=6", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"hut({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Weighed)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()
    follows(tuned, lambda x, A, B: F.linear(
        x, W * (1 + 2.0 * torch.einsum("or,ri->oi", B, A)), bias), [term.A, term.B], (5, 3, 12))


def test_zeros_stay_and_the_rank_is_not_bound():
    model, _, term = made(inp=16, out=16)
    with torch.no_grad():
        model[0].weight[3, 5] = 0
        term.B.normal_()
    W = model[0].weight.detach()
    change = term.of(W) - W
    assert change[3, 5] == 0 and int(torch.linalg.matrix_rank(change)) == 16


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "hut(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("hut")
    assert 48 * method.count(Place("a", "weight", "linear", 1024, 1024)) == 786_432
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == 0
    assert keeps_what_it_says("hut", "vit") is None
    _, tuned, term = made(inp=400)
    A = term.A.detach()
    assert -400**-0.5 <= float(A.min()) < -0.045 and 0.045 < float(A.max()) <= 400**-0.5
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_refusals():
    with pytest.raises(RankError, match="^hut: rank 10"):
        made("rank=10")
    assert burnish.parse("hut(targets='q')")[0].claims() == ("the function of W on q",)
    assert burnish.parse("hut")[0].claims() == ("the function of W on the default targets",)
    assert burnish.parse("hut")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0}
