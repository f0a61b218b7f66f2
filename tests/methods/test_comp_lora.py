"""Comp-LoRA: a low-rank update beside the principal directions, not on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.spectrum import leading
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.methods.delta.lowrank.comp_lora import Aside
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3, alpha=6, kept=4", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"comp_lora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Aside)
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    term.double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()
    U, V = term.U, term.V
    left = torch.eye(9, dtype=W.dtype) - U @ U.t()
    right = torch.eye(12, dtype=W.dtype) - V @ V.t()
    follows(tuned, lambda x, A, B: F.linear(x, W + 2.0 * left @ B @ A @ right, bias),
            [term.A, term.B], (5, 3, 12))


def test_principal_triplets_are_those_of_the_tuned_weight_too():
    model, _, term = made()
    with torch.no_grad():
        term.B.normal_()
    W = model[0].weight.detach()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    change = term.dense().double()
    change = change.detach()
    assert float((U[:, :4].t() @ change).abs().max()) < 1e-5
    assert float((change @ Vt[:4].t()).abs().max()) < 1e-5
    torch.testing.assert_close((W + change) @ Vt[:4].t(), U[:, :4] * S[:4], rtol=0, atol=1e-5)
    assert float(change.norm()) > 0.5 * float(W.norm())
    found = leading(W, W + change, 9)                # none of the four is new, whatever else is
    kept = (found.s[:, None] - S[:4]).abs().min(1).values < 1e-5
    assert int(kept.sum()) == 4 and not found.intruders(0.5)[kept].any()


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "comp_lora(rank=2, kept=4)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("comp_lora")
    assert 36 * method.count(Place("a", "weight", "linear", 768, 768)) == 110_592
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == method.rank
    assert keeps_what_it_says("comp_lora", "vit") is None
    _, tuned, term = made(inp=400)
    A = term.A.detach()
    assert -400**-0.5 <= float(A.min()) < -0.045 and 0.045 < float(A.max()) <= 400**-0.5
    assert not term.B.any()
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.15)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_refusals():
    with pytest.raises(burnish.RecipeError, match="^comp_lora: kept=0"):
        burnish.parse("comp_lora(kept=0)")
    assert burnish.parse("comp_lora(kept=1)")
    for settings in ("rank=0, kept=4", "rank=6, kept=4"):
        with pytest.raises(RankError, match="they have 9 together"):
            made(settings)
    made("rank=5, kept=4"), made("rank=1, kept=4")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError):
        burnish.tune(model, "comp_lora(rank=2, kept=2)", head=False, targets="0")
    assert burnish.parse("comp_lora")[0].settings() == {"targets": None, "rank": 2, "alpha": 2.0,
                                                        "kept": 64}
