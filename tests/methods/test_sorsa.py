"""SORSA: principal triplets that train and are kept close to orthonormal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.triplets_less import LessTriplets
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"sorsa({settings})", head=False, targets="0")
    (_, term), = tuned.terms(LessTriplets)
    term.double()
    return model, tuned, term


@pytest.mark.parametrize("settings, s", [("rank=3", 1.0), ("rank=3, alpha=6", 2.0)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, s):
    model, tuned, term = made(settings)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    rest = W - s * U[:, :3] @ torch.diag(S[:3]) @ Vt[:3]
    with torch.no_grad():
        for p in term.parameters():
            p.add_(torch.randn_like(p))
    follows(tuned, lambda x, P, E, Q: F.linear(x, rest + s * P @ torch.diag(E) @ Q, bias),
            [term.P, term.E, term.Q], (5, 3, 12), rtol=1e-5, atol=1e-5)  # its start is in fp32


def test_it_starts_with_the_principal_triplets():
    model, _, term = made("rank=3, alpha=6")
    S = torch.linalg.svdvals(model[0].weight.detach())
    torch.testing.assert_close(term.E.detach(), S[:3], rtol=1e-6, atol=1e-7)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(term.P.t() @ term.P, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(term.Q @ term.Q.t(), eye, rtol=0, atol=1e-6)
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "sorsa(rank=4)")
    assert torch.equal(net(**batch).logits, want)


def test_its_values_are_those_of_what_trains_while_the_vectors_are_orthonormal():
    """The singular values of s P diag(E) Q are s |E|, wherever E has gone."""
    _, _, term = made("rank=3, alpha=6")
    with torch.no_grad():
        term.E.copy_(torch.tensor([0.3, -2.0, 1.1]))
    got = torch.linalg.svdvals(2.0 * term.P @ torch.diag(term.E) @ term.Q).detach()
    torch.testing.assert_close(got[:3], torch.tensor([4.0, 2.2, 0.6]).double(), rtol=1e-5,
                               atol=1e-6)
    assert float(got[3]) < 1e-6


def test_the_penalty_is_the_mean_distance_from_orthonormal():
    _, tuned, term = made("rank=3, ortho=2.0")
    with torch.no_grad():
        term.P.normal_(), term.Q.normal_()
    eye = torch.eye(3, dtype=torch.float64)
    want = 2.0 * ((term.P.t() @ term.P - eye).norm() + (term.Q @ term.Q.t() - eye).norm()) / 2
    got = sum(t.value() for t in tuned.recipe[0].objective(tuned, None))
    torch.testing.assert_close(got, want)
    assert not list(burnish.parse("sorsa(ortho=0)")[0].objective(tuned, None))


def test_the_penalty_keeps_factors_orthonormal():
    def crooked(ortho):
        model, tuned, term = made(f"rank=3, ortho={ortho}")
        torch.manual_seed(3)
        x, y = torch.randn(64, 12).double(), torch.randn(64, 9).double()
        opt = tuned.optimizer(lr=1e-2)
        for _ in range(60):
            tuned.loss((x, y), lambda out, b: (out - b[1]).square().mean()).backward()
            opt.step()
            opt.zero_grad()
        eye = torch.eye(3, dtype=torch.float64)
        return float((term.Q @ term.Q.t() - eye).norm().detach())

    assert crooked(5.0) < crooked(0.0) / 2


def test_it_leaves_as_a_lora_of_twice_the_rank():
    _, _, term = made("rank=3, alpha=6")
    with torch.no_grad():
        for p in term.parameters():
            p.add_(torch.randn_like(p))
    A, B = term.pair()
    assert A.shape == (6, 12) and B.shape == (9, 6)
    want = 2.0 * (term.P @ torch.diag(term.E) @ term.Q - term.C0 @ term.Q0)
    torch.testing.assert_close(B @ A, want)
    torch.testing.assert_close(term.dense(), want)


def test_counts_and_cost():
    (method,) = burnish.parse("sorsa")
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert 32 * sum(method.count(Place("a", "weight", "linear", o, i)) for o, i in shapes) == \
        319_844_352
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == 2 * method.rank
    assert keeps_what_it_says("sorsa", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("settings", ["ortho=-1", "alpha=0", "alpha=-2"])
def test_settings_that_are_none_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^sorsa"):
        burnish.parse(f"sorsa({settings})")


def test_any_positive_scale_is_taken():
    assert burnish.parse("sorsa(alpha=0.5)")


def test_what_has_no_such_triplets_is_refused():
    with pytest.raises(RankError, match="^sorsa: rank 10"):
        made("rank=10")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError):
        burnish.tune(model, "sorsa(rank=2)", head=False, targets="0")
    assert burnish.parse("sorsa")[0].settings() == {"targets": None, "rank": 128, "alpha": None,
                                                    "ortho": 13.3}
