"""HRA: a chain of reflections, against the chain multiplied out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.reflections import Reflections
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def chain(U):
    """H_1 H_2 .. H_r, one after the other."""
    R = torch.eye(U.shape[0], dtype=U.dtype)
    for u in U.unbind(1):
        R = R @ (torch.eye(U.shape[0], dtype=U.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return R


def made(rank=4, inp=12, out=9, recipe=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, recipe or f"hra(rank={rank})", head=False, targets="0")
    (_, term), = tuned.terms(Reflections)
    term.double()
    return model, W, bias, tuned, term


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_outputs_and_gradients_are_those_of_the_chain(rank):
    model, W, bias, tuned, term = made(rank)
    with torch.no_grad():
        term.U.normal_()
    follows(tuned, lambda x, U: F.linear(x, W @ chain(U), bias), [term.U], (5, 3, 12))
    V = W @ chain(term.U).detach()
    torch.testing.assert_close(V @ V.t(), W @ W.t(), rtol=1e-9, atol=1e-11)


def test_pairs_undo_each_other_at_the_start():
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "hra(rank=4)")
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-5)
    for _, term in tuned.terms(Reflections):
        assert torch.equal(term.U[:, 0::2], term.U[:, 1::2]) and bool(term.U.any())
        assert float(term.U.detach().abs().max()) <= (term.U.shape[1] // 2) ** -0.5


def test_it_is_what_peft_computes():
    import peft

    base = nn.Sequential(nn.Linear(16, 10))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.HRAConfig(r=4, target_modules=["0"]))
    tuned = burnish.tune(ours, "hra(rank=4)", head=False, targets="0")
    (_, term), = tuned.terms(Reflections)
    (_, held), = [(n, p) for n, p in theirs.named_parameters() if "hra_u" in n]
    with torch.no_grad():
        term.U.normal_()
        held.copy_(term.U)
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_counts():
    (method,) = burnish.parse("hra(rank=8)")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 32_768
    assert method.count(Place("a", "weight", "linear", 11, 7)) == 56


def test_the_penalty_is_the_distance_from_right_angles():
    _, _, _, tuned, term = made(recipe="hra(rank=4, penalty=0.3)")
    with torch.no_grad():
        term.U.normal_()
    U = term.U.detach().clone().requires_grad_()
    N = U / U.norm(dim=0)
    want = 0.3 * (N.t() @ N - torch.eye(4, dtype=N.dtype)).square().sum()
    (pull,) = tuned.recipe[0].objective(tuned, None)
    torch.testing.assert_close(pull.value(), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pull.gradients()[0], *torch.autograd.grad(want, U), rtol=1e-8,
                               atol=1e-10)
    assert not list(burnish.parse("hra(rank=4)")[0].objective(tuned, None))


@pytest.mark.parametrize("settings", ["rank=0", "rank=3", "rank=-2", "penalty=-1"])
def test_what_has_no_pairs_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^hra"):
        burnish.parse(f"hra({settings})")


def test_more_reflections_than_inputs_are_refused():
    with pytest.raises(RankError, match="largest rank"):
        burnish.tune(nn.Sequential(nn.Linear(6, 4)), "hra(rank=8)", head=False, targets="0")


def test_two_functions_of_one_weight_are_refused():
    with pytest.raises(burnish.RecipeError, match="function of W"):
        burnish.tune(nn.Sequential(nn.Linear(16, 4)), "hra(rank=2) + oft(block=4)", head=False,
                     targets="0")


def test_defaults_and_no_decay():
    assert burnish.parse("hra")[0].settings() == {"targets": None, "rank": 8, "penalty": 0.0}
    _, _, _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_bounds_and_cost():
    assert keeps_what_it_says("hra", "vit") is None
    assert burnish.parse("hra")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert burnish.parse("hra(rank=2)")
    with pytest.raises(burnish.RecipeError, match="^hra: rank=1"):
        burnish.parse("hra(rank=1)")
    assert burnish.parse("hra(targets='q')")[0].claims() == ("the function of W on q",)
    assert burnish.parse("hra")[0].claims() == ("the function of W on the default targets",)
