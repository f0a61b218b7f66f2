"""Orthogonal Adaptation: concepts that add up without touching each other."""

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
from burnish.methods.delta.lowrank.orthogonal import columns
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

torch.manual_seed(0)
BASE = nn.Sequential(nn.Linear(12, 9))


def made(settings):
    model = copy.deepcopy(BASE)
    tuned = burnish.tune(model, f"orthogonal({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Chain)
    with torch.no_grad():
        term.B.normal_()
    return model, tuned, term


@pytest.mark.parametrize("settings, s", [("rank=3", 1.0), ("rank=3, alpha=6", 2.0)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, s):
    model, tuned, term = made(settings)
    model.double(), term.double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = torch.randn(5, 3, 12, dtype=torch.float64, requires_grad=True)
    got, want = model(x), F.linear(x, W + s * term.B @ term.A, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.B], g),
                    torch.autograd.grad(want, [x, term.B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not term.A.requires_grad


def test_concepts_stand_at_right_angles():
    whole = torch.cat([made(f"rank=3, concept={i}")[2].A.detach() for i in range(4)])
    torch.testing.assert_close(whole @ whole.t(), torch.eye(12), rtol=0, atol=1e-6)
    assert torch.equal(whole[:3], columns(12, 0, 3, 0))
    assert torch.equal(whole[6:9], columns(12, 6, 9, 0)), "more concepts change none before"
    assert not torch.equal(whole[:3], columns(12, 0, 3, 1))


def test_the_matrix_is_orthogonal_as_far_as_single_precision_tells():
    rows = columns(256, 0, 256, 0).double()
    torch.testing.assert_close(rows @ rows.t(), torch.eye(256, dtype=rows.dtype), rtol=0,
                               atol=3e-7)


def test_a_concept_does_not_change_anothers_inputs():
    first, _, one = made("rank=3")
    second, tuned, two = made("rank=3, concept=1")
    x = torch.randn(7, 3) @ one.A.detach()                    # in the first concept's span
    torch.testing.assert_close(second(x), BASE(x), rtol=1e-5, atol=1e-5)
    both = F.linear(x, BASE[0].weight + one.dense() + two.dense(), BASE[0].bias)
    torch.testing.assert_close(both, first(x), rtol=1e-5, atol=1e-5)
    assert abs(float((one.dense() * two.dense()).sum())) < 1e-4


def test_concepts_that_were_trained_apart_add_up_in_one_model():
    """W + 0.6 (Delta_1 + Delta_2), used and merged: on the first one's inputs, 0.6 Delta_1."""
    model = copy.deepcopy(BASE).double()
    tuned = burnish.tune(model, "orthogonal(rank=3)", head=False, targets="0")
    tuned.add("two", "orthogonal(rank=3, concept=1)", targets="0", head=False)
    slot = model[0].burnish
    one, two = slot.default["orthogonal"].double(), slot.two["orthogonal"].double()
    with torch.no_grad():
        one.B.normal_(), two.B.normal_()
    x = torch.randn(7, 3, dtype=torch.float64) @ one.A.detach()
    want = F.linear(x, model[0].weight + 0.6 * (one.B @ one.A).detach(), model[0].bias)
    tuned.use({"default": 0.6, "two": 0.6})
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=0, atol=1e-6)


def test_sixteen_concepts_of_rank_20_have_room_in_320_inputs():
    model = nn.Sequential(nn.Linear(320, 320))
    tuned = burnish.tune(model, "orthogonal(concept=15)", head=False, targets="0")
    (_, last), = tuned.terms(Chain)
    tuned.detach()
    tuned = burnish.tune(model, "orthogonal(concept=14)", head=False, targets="0")
    (_, other), = tuned.terms(Chain)
    assert float((last.A @ other.A.t()).detach().abs().max()) < 1e-6
    tuned.detach()
    with pytest.raises(burnish.RecipeError, match="concept 16 .* the last one there is 15"):
        burnish.tune(model, "orthogonal(concept=16)", head=False, targets="0")


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "orthogonal(rank=4)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("orthogonal")
    place = Place("a", "weight", "linear", 320, 640)
    assert method.count(place) == 6_400 and method.per_token(place) == 20
    assert type(method).keeps_input is False and keeps_what_it_says("orthogonal", "vit") is None
    _, tuned, _ = made("rank=3")
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_refusals():
    with pytest.raises(burnish.RecipeError, match="^orthogonal: concept=-1"):
        burnish.parse("orthogonal(concept=-1)")
    with pytest.raises(burnish.RecipeError, match="the last one there is 3"):
        made("rank=3, concept=4")
    made("rank=3, concept=3")
    with pytest.raises(RankError, match="^orthogonal: rank 10"):
        made("rank=10")
    assert burnish.parse("orthogonal")[0].settings() == {
        "targets": None, "rank": 20, "alpha": None, "concept": 0, "seed": 0}
