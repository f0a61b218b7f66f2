"""Block-LoRA: several up-projections behind one down-projection."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.lowrank.block_lora import Summed
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=6, blocks=3, alpha=12", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"block_lora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Summed)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()
    follows(tuned, lambda x, A, B: F.linear(x, W + 2.0 * sum(b @ A for b in B), bias),
            [term.A, term.B], (5, 3, 12))
    assert int(torch.linalg.matrix_rank(term.dense())) == 2


def test_it_is_a_lora_whose_b_learns_faster():
    """Plain descent, step by step: B_1 + .. + B_n moves n times as fast as one B."""
    model, _, term = made("rank=6, blocks=3, alpha=6")
    start = copy.deepcopy(model[0])
    A = term.A.detach().clone().requires_grad_()
    B = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(20, 12).double(), torch.randn(20, 9).double()
    W, bias = start.weight.detach(), start.bias.detach()
    for _ in range(5):
        dA, dB = torch.autograd.grad((model(x) - y).square().mean(), [term.A, term.B])
        da, db = torch.autograd.grad((F.linear(x, W + B @ A, bias) - y).square().mean(), [A, B])
        with torch.no_grad():
            term.A -= 0.1 * dA
            term.B -= 0.1 * dB
            A -= 0.1 * da
            B -= 0.3 * db
    torch.testing.assert_close(term.B.sum(0), B, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(term.A, A, rtol=1e-9, atol=1e-12)


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "block_lora(rank=4, blocks=2)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("block_lora(rank=8, blocks=8)")
    assert method.count(Place("a", "weight", "linear", 768, 768)) == 6_912
    (lora,) = burnish.parse("lora(rank=8)")
    assert lora.count(Place("a", "weight", "linear", 768, 768)) == 12_288
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == 1
    assert keeps_what_it_says("block_lora", "vit") is None
    _, tuned, term = made(inp=400)
    A = term.A.detach()
    assert -400**-0.5 <= float(A.min()) < -0.045 and 0.045 < float(A.max()) <= 400**-0.5
    assert not term.B.any()
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.15)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("settings", ["blocks=0", "rank=6, blocks=4"])
def test_ranks_that_have_no_equal_blocks_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^block_lora"):
        burnish.parse(f"block_lora({settings})")


def test_ranks_that_do_not_fit_are_refused():
    for rank in (0, 40):
        with pytest.raises(RankError, match="the largest rank there is 36"):
            made(f"rank={rank}")
    made("rank=36"), made("rank=4")
    assert burnish.parse("block_lora(blocks=1)")
    assert burnish.parse("block_lora")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0,
                                                         "blocks": 4}
