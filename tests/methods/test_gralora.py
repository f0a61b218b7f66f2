"""GraLoRA: a grid of blocks, each with a thin product of its own, written out block by block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.granular import Granular
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def update(A, B, rest, k, s):
    """Block by block."""
    c = A.shape[2] // k
    rows = []
    for j in range(k):
        rows.append(torch.cat([
            B[j, n * c : (n + 1) * c].t() @ A[n, :, j * c : (j + 1) * c].t() for n in range(k)], 1))
    whole = torch.cat(rows)
    return s * (whole if not rest else whole + rest[1] @ rest[0])


def made(settings, inp=12, out=18):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"gralora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Granular)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    return model, tuned, term


@pytest.mark.parametrize("settings, k, s", [
    ("rank=4, cells=2, alpha=6", 2, 1.5), ("rank=6, cells=3, alpha=6", 3, 1.0),
    ("rank=2, cells=1, alpha=6", 1, 3.0), ("rank=4, cells=2, beside=2, alpha=9", 2, 1.5)])
def test_outputs_and_gradients_are_those_of_the_blocks(settings, k, s):
    model, tuned, term = made(settings)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    letters = [p for p in (term.A, term.B, term.A_rest, term.B_rest) if p is not None]
    follows(tuned, lambda x, A, B, *rest: F.linear(x, W + update(A, B, rest, k, s), b), letters,
            (5, 3, 12))
    A, B = term.pair()
    torch.testing.assert_close(B @ A, update(*letters[:2], letters[2:], k, s), rtol=1e-10,
                               atol=1e-12)
    assert len(A) == k * term.A.shape[2] + (2 if len(letters) > 2 else 0)


def test_its_rank_is_more_than_loras_of_as_many_numbers():
    _, _, term = made("rank=4, cells=4", 32, 32)
    assert int(torch.linalg.matrix_rank(term.dense())) == 16
    assert sum(p.numel() for p in term.parameters()) == 4 * 64


def test_an_outlier_moves_its_own_column_of_blocks_alone():
    """Where one input alone speaks, the gradient of A is that of its run."""
    _, tuned, term = made("rank=4, cells=2")
    x = torch.zeros(3, 12, dtype=torch.float64)
    x[:, 8] = 1.0
    (g,) = torch.autograd.grad(tuned.model(x).square().sum(), term.A)
    assert not g[0].any() and g[1].any()


def test_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "gralora(rank=4, beside=2)")
    assert torch.equal(net(**batch).logits, want)
    torch.manual_seed(0)
    tuned = burnish.tune(nn.Sequential(nn.Linear(400, 8)), "gralora(rank=8, cells=4, beside=4)",
                         head=False, targets="0")
    (_, term), = tuned.terms(Granular)
    for t, edge in ((term.A, 0.1), (term.A_rest, 0.05)):
        assert 0.95 * edge < float(t.detach().max()) <= edge
        assert -edge <= float(t.detach().min()) < -0.95 * edge
    assert not term.B.any() and not term.B_rest.any()


def test_dropout_is_on_the_input_of_all():
    model, _, term = made("rank=4, cells=2, beside=1, dropout=0.5")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, F.linear(x, W, bias) + F.dropout(x, 0.5) @ term.dense().t(),
                               rtol=1e-10, atol=1e-12)
    assert term.float().path(x.bfloat16()).dtype == torch.bfloat16


def test_counts_cost_and_defaults():
    (method,) = burnish.parse("gralora")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 262_144
    assert burnish.parse("gralora(beside=8)")[0].count(
        Place("a", "weight", "linear", 64, 32)) == 40 * 96
    assert method.per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert method.settings() == {"targets": None, "rank": 32, "alpha": 64.0, "cells": 2,
                                 "beside": 0, "dropout": 0.0}
    assert keeps_what_it_says("gralora", "vit") is None
    _, tuned, _ = made("rank=4, beside=1")
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("recipe, words", [
    ("gralora(cells=0)", "cells=0"), ("gralora(rank=0)", "rank=0"),
    ("gralora(rank=3)", "cells=2 does not divide rank=3"), ("gralora(beside=-1)", "beside=-1"),
    ("gralora(dropout=1.0)", "dropout is a probability"),
    ("gralora(rank=5, cells=5)", r"cells=5 does not divide 0.weight \(12 x 10\)"),
    ("gralora(rank=4, cells=4)", r"cells=4 does not divide 0.weight \(12 x 10\)"),
    ("gralora(rank=12)", "the largest rank there is 10"),
    ("gralora(rank=4, beside=11)", None)])
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises((RecipeError, RankError), match=f"^gralora.*{words or 'largest rank'}"):
        burnish.tune(nn.Sequential(nn.Linear(10, 12)), recipe, head=False, targets="0")


def test_the_largest_rank_is_taken():
    made("rank=10, cells=2", 10, 12), made("rank=1, cells=1")
