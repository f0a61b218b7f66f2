"""MiCA: an update that writes into the directions which the weight uses least."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

torch.manual_seed(0)
BASE = nn.Sequential(nn.Linear(12, 9))


def made(settings, base=BASE):
    model = copy.deepcopy(base)
    tuned = burnish.tune(model, f"mica({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Chain)
    return model, tuned, term


@pytest.mark.parametrize("out, inp", [(9, 12), (12, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_b_is_what_the_weight_uses_least(out, inp, rank):
    base = nn.Sequential(nn.Linear(inp, out))
    _, _, term = made(f"rank={rank}", base)
    W, B = base[0].weight.detach().double(), term.B.detach().double()
    assert B.shape == (out, rank) and not term.A.any()
    torch.testing.assert_close(B.t() @ B, torch.eye(rank).double(), rtol=0, atol=1e-5)
    values, vectors = torch.linalg.eigh(W @ W.t())            # ascending
    first = out - min(out, inp)                               # those of an empty space are no part
    least = vectors[:, first : first + rank]
    torch.testing.assert_close(B @ B.t(), least @ least.t(), rtol=0, atol=1e-4)
    torch.testing.assert_close((B.t() @ W).norm() ** 2, values[first : first + rank].sum(),
                               rtol=1e-3, atol=1e-6)


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made("rank=3, alpha=6")
    model.double(), term.double()
    W, bias, B = (t.detach().clone() for t in (model[0].weight, model[0].bias, term.B))
    with torch.no_grad():
        term.A.normal_()
    follows(tuned, lambda x, A: F.linear(x, W + 2.0 * torch.einsum("or,ri->oi", B, A), bias),
            [term.A], (5, 3, 12))
    assert [n.rpartition(".")[2] for n, _ in tuned.named_parameters()] == ["A"]


def test_only_a_moves_and_a_file_brings_b(tmp_path):
    model, tuned, term = made("rank=3, dropout=0.25")
    assert term.dropout == 0.25
    was = term.B.detach().clone()
    tuned.optimizer(lr=0.1, weight_decay=0.5)
    x = torch.randn(5, 12)
    for _ in range(3):
        tuned.step((x,), loss=lambda out, batch: out.square().mean())
    assert torch.equal(term.B, was) and term.A.abs().min() > 0
    tuned.save(tmp_path)
    other = copy.deepcopy(BASE)
    (_, again), = burnish.load(other, tmp_path).terms(Chain)
    assert torch.equal(again.B, was) and not again.B.requires_grad
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "mica(rank=4)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("mica")
    place = Place("a", "weight", "linear", 320, 640)
    assert method.count(place) == 5_120 and method.per_token(place) == 0
    assert keeps_what_it_says("mica", "vit") is None
    _, tuned, term = made("rank=3")
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0} and not term.B.burnish_decay


def test_refusals():
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match="^mica: dropout is a probability"):
            burnish.parse(f"mica(dropout={p})")
    with pytest.raises(RankError, match="^mica: rank 10"):
        made("rank=10")
    assert burnish.parse("mica")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0,
                                                   "dropout": 0.0}
