"""SVDiff: singular values that shift, none below zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.between import Shifted
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer).double()
    tuned = burnish.tune(model, "svdiff", head=False, targets="0")
    (_, term), = tuned.terms(Shifted)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    torch.manual_seed(1)
    model, tuned, term = made(nn.Linear(12, 9))
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        term.delta.normal_()
        term.delta[2] = -5 * S[0]                                  # one that is cut at zero
    follows(tuned, lambda x, delta: F.linear(
        x, U @ torch.diag(torch.relu(S + delta)) @ Vt, bias), [term.delta], (5, 3, 12),
        rtol=1e-5, atol=1e-5)                                          # vectors are held in fp32
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    assert float(term.delta.detach()[2]) < 0 and float(torch.autograd.grad(
        model(x).sum(), term.delta)[0][2]) == 0


def test_a_kernel_is_one_matrix():
    model, _, term = made(nn.Conv2d(4, 6, 3))
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W.flatten(1), full_matrices=False)
    with torch.no_grad():
        term.delta.normal_()
    moved = (U @ torch.diag(torch.relu(S + term.delta.detach())) @ Vt).view_as(W)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.conv2d(x, moved, bias), rtol=1e-5, atol=1e-6)


def test_start_count_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "svdiff")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("svdiff")
    for place in (Place("a", "weight", "linear", 9, 12), Place("a", "weight", "linear", 12, 9)):
        assert method.count(place) == method.per_token(place) == 9
    assert type(method).keeps_input is False and keeps_what_it_says("svdiff", "vit") is None
    _, tuned, _ = made(nn.Linear(5, 4))
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_no_square_of_the_longer_side_is_made(monkeypatch):
    sizes, svd = [], torch.linalg.svd

    def seen(W, **kw):
        found = svd(W, **kw)
        sizes.append([tuple(t.shape) for t in found])
        return found

    monkeypatch.setattr(torch.linalg, "svd", seen)
    made(nn.Linear(12, 9)), made(nn.Linear(5, 20))
    assert sizes == [[(9, 9), (9,), (9, 12)], [(20, 5), (5,), (5, 5)]]
