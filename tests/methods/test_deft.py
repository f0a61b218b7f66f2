"""DEFT: a subspace of a weight's answers taken out, and another matrix put there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.methods.delta.ofw.deft import Injected
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says


def made(settings="rank=3", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"deft({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Injected)
    term.double()
    return model, tuned, term


def basis(P):
    """Gram-Schmidt, a column after the other."""
    found = []
    for p in P.t():
        for q in found:
            p = p - q * (q @ p)
        found.append(p / p.square().sum().sqrt())
    return torch.stack(found, 1)


CASES = {
    "": lambda W, P, R: W - P @ torch.relu(P).t() @ W + P @ R,
    "alpha=6.0": lambda W, P, R: W - P @ torch.relu(P).t() @ W + 2 * P @ R,
    "inject=False": lambda W, P: W - P @ torch.relu(P).t() @ W,
    "inject=False, form='qr'": lambda W, P: W - basis(P) @ basis(P).t() @ W,
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_equation(case):
    model, tuned, term = made(f"rank=3, {case}")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=0.5)
    follows(tuned, lambda x, *t: F.linear(x, CASES[case](W, *t), bias),
            list(term.parameters()), (5, 3, 12))


def test_an_orthonormal_basis_whose_signs_are_the_decompositions_own():
    """R stands in the basis that torch finds, whose vectors point as they will."""
    model, tuned, term = made("rank=3, form='qr', alpha=6.0")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=0.5)
    sign = (torch.linalg.qr(term.P.detach()).Q * basis(term.P.detach())).sum(0).sign()

    def equation(x, P, R):
        Q = basis(P) * sign
        return F.linear(x, W - Q @ Q.t() @ W + 2 * Q @ R, bias)

    follows(tuned, equation, [term.P, term.R], (5, 3, 12))


@pytest.mark.parametrize("case", ["rank=3", "rank=3, alpha=7.0", "rank=3, form='qr'"])
def test_the_start_is_the_base(case):
    model, tuned, term = made(case)
    x = torch.randn(5, 12, dtype=torch.float64)
    with tuned.disabled():
        want = model(x)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    if "," not in case:
        assert float(term.R.detach().abs().max()) > 1e-3
        single = nn.Linear(12, 9)
        burnish.tune(single, "deft(rank=3)", targets="*")
        x = torch.randn(5, 12)
        assert torch.equal(single(x), F.linear(x, single.weight, single.bias))


def test_a_projection_leaves_nothing_of_the_subspace_but_what_is_put_in():
    model, tuned, term = made("rank=3, form='qr', inject=False")
    stir(tuned, size=0.5)
    merged = tuned.merge()[0].weight.detach()
    torch.testing.assert_close(term.P.detach().t() @ merged, torch.zeros(3, 12).double(), rtol=0,
                               atol=1e-12)


def test_p_starts_small():
    _, _, term = made("rank=100", inp=300, out=200)
    assert float(term.P.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(term.P.mean())) < 1e-3


def test_what_is_kept_is_a_chain_of_its_rank():
    assert keeps_what_it_says("deft", "vit") is None


def test_counts_defaults_and_refusals():
    place = Place("a", "weight", "linear", 3072, 768)
    assert burnish.parse("deft")[0].count(place) == 8 * (3072 + 768)
    assert burnish.parse("deft(inject=False)")[0].count(place) == 8 * 3072
    assert burnish.parse("deft")[0].per_token(place) == 8
    assert burnish.parse("deft")[0].per_forward(place) == 8 * 768
    assert burnish.parse("deft(form='qr')")[0].per_forward(place) == 8 * 3840
    assert burnish.parse("deft")[0].settings() == {"targets": None, "rank": 8, "form": "relu",
                                                   "alpha": None, "inject": True}
    for wrong in ("alpha=0", "alpha=-1.0", "alpha=2.0, inject=False"):
        with pytest.raises(burnish.RecipeError, match="^deft: alpha"):
            burnish.parse(f"deft({wrong})")
    assert burnish.parse("deft(alpha=0.5)")
    with pytest.raises(RankError, match="^deft: rank 10"):
        made("rank=10")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError):
        burnish.tune(model, "deft(rank=2)", head=False, targets="0")
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
