"""DeLoRA: rank-one parts of length one under a bound, against the sum written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.normed import LEAST, Normed
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def update(A, B, lam, n):
    total = 0
    for i in range(len(A)):
        a, b = A[i].square().sum().sqrt(), B[:, i].square().sum().sqrt()
        total = total + lam / len(A) * torch.outer(B[:, i], A[i]) / (a * b)
    return total * n


def made(settings="rank=3", inp=7, out=11):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"delora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Normed)
    term.double()
    return model, tuned, term


@pytest.mark.parametrize("norm", ["column", "matrix"])
def test_outputs_and_gradients_are_those_of_the_sum(norm):
    model, tuned, term = made(f"rank=3, norm={norm!r}")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    n = W.square().sum(0).sqrt() if norm == "column" else W.square().sum().sqrt().expand(7)
    torch.testing.assert_close(term.norms, n, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        term.norms.copy_(n)
        for p in tuned.parameters():
            p.normal_()
    follows(tuned, lambda x, A, B, lam: F.linear(x, W + update(A, B, lam, n), bias),
            [term.A, term.B, term.lam], (5, 3, 7))


def test_lengths_do_not_matter_and_the_bound_does():
    """Delta is the same for any length of a_i and b_i; its parts together reach no further than
    lam |W|_F."""
    model, tuned, term = made("rank=3, norm='matrix', reach=2")
    with torch.no_grad():
        term.B.normal_()
        before = term.dense().clone()
        term.A[1].mul_(7)
        term.B[:, 2].mul_(0.1)
    torch.testing.assert_close(term.dense(), before, rtol=1e-10, atol=1e-12)
    W = model[0].weight.detach()
    assert float(before.norm()) <= 2 * float(W.norm())
    A, B = term.pair()
    torch.testing.assert_close(B @ A, before, rtol=1e-10, atol=1e-12)
    with torch.no_grad():                        # all parts alike: as far as it goes
        term.A.copy_(term.A[:1].expand_as(term.A))
        term.B.copy_(term.B[:, :1].expand_as(term.B))
    assert float(term.dense().norm()) == pytest.approx(2 * float(W.norm()), rel=1e-6)


def test_a_short_part_counts_as_one_of_a_ten_thousandth():
    model, _, term = made("rank=1, reach=3")
    with torch.no_grad():
        term.B.normal_().mul_(1e-6)
    want = 3 * torch.outer(term.B[:, 0], term.A[0]) / (term.A[0].norm() * LEAST) * term.norms
    torch.testing.assert_close(term.dense(), want, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        term.A.mul_(1e-6 / term.A.norm())
        term.B.normal_()
    want = 3 * torch.outer(term.B[:, 0], term.A[0]) / (term.B.norm() * LEAST) * term.norms
    torch.testing.assert_close(term.dense(), want, rtol=1e-10, atol=1e-14)
    assert LEAST == 1e-4


def test_the_start_is_the_base_and_moves():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "delora(rank=2, reach=4)", head=False)
    assert torch.equal(net(**batch).logits, want)
    tuned.loss(batch).backward()
    for _, t in tuned.terms(Normed):
        assert t.lam.item() == 4 and t.B.grad.abs().sum() > 0
    _, _, term = made(inp=400)
    A = term.A.detach()
    assert 0.045 < float(A.max()) <= 0.05 and -0.05 <= float(A.min()) < -0.045


def test_dropout_is_on_the_input():
    model, _, term = made("rank=2, dropout=0.5", inp=400)
    with torch.no_grad():
        term.B.normal_()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = torch.ones(3, 400, dtype=torch.float64)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, F.linear(x, W, bias) + F.dropout(x, 0.5) @ term.dense().t(),
                               rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.eval()(x), F.linear(x, W + term.dense(), bias), rtol=1e-10,
                               atol=1e-12)


def test_half_precision_runs():
    _, _, term = made()
    assert term.float().product(torch.randn(2, 7).bfloat16()).dtype == torch.bfloat16


def test_counts_cost_and_defaults():
    (method,) = burnish.parse("delora")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 65_537
    assert method.per_token(Place("a", "weight", "linear", 9, 7)) == method.rank
    assert method.settings() == {"targets": None, "rank": 8, "reach": 15.0, "norm": "column",
                                 "dropout": 0.0}
    assert keeps_what_it_says("delora", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("recipe, words", [
    ("delora(reach=0)", "reach=0"), ("delora(reach=-1)", "reach=-1"),
    ("delora(dropout=1.0)", "dropout is a probability")])
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises(RecipeError, match=f"^delora: {words}"):
        burnish.parse(recipe)
    with pytest.raises(RankError, match="largest rank there is 7"):
        made("rank=8")
