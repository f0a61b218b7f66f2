"""PEANuT: a network reads the weight and says how it is to change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.ofw.peanut import Tweaked
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says


def made(settings="rank=3", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"peanut({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Tweaked)
    term.double()
    return model, tuned, term


CASES = {
    "scale=2.0": lambda W, A, B: 2 * B @ torch.relu(A @ W),
    "act='tanh'": lambda W, A, B: B @ torch.tanh(A @ W),
    "encoders=1": lambda W, A, B, E, D: B @ (torch.relu(D @ torch.relu(E @ torch.relu(A @ W)))
                                          + torch.relu(A @ W)),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_equation(case):
    model, tuned, term = made(f"rank=3, {case}")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=0.5)
    follows(tuned, lambda x, *t: F.linear(x, W + CASES[case](W, *t), bias),
            [term.A, term.B, *term.encoders, *term.decoders], (5, 3, 12))


def test_residuals_come_back_in_turn():
    model, tuned, term = made("rank=3, encoders=2, act='gelu'")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=0.5)

    def change(W, A, B, E0, E1, D0, D1):
        first = F.gelu(A @ W)
        second = F.gelu(E0 @ first)
        inner = F.gelu(D0 @ F.gelu(E1 @ second)) + second
        return B @ (F.gelu(D1 @ inner) + first)

    follows(tuned, lambda x, *t: F.linear(x, W + change(W, *t), bias),
            [term.A, term.B, *term.encoders, *term.decoders], (5, 3, 12))


def test_it_reads_what_stands_beside_it_too():
    """The function of W is of the base and all that is added, and its gradients reach that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    tuned = burnish.tune(model, "peanut(rank=3) + lora(rank=2, alpha=2)", head=False, targets="0")
    for m in model[0].burnish.default.values():
        m.double()
    stir(tuned, size=0.5)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    (_, p), = tuned.terms(Tweaked)
    (lora,) = [m for m in model[0].burnish.default.values() if m is not p]

    def equation(x, A, B, P, Q):
        V = W + Q @ P
        return F.linear(x, V + B @ torch.relu(A @ V), bias)

    follows(tuned, equation, [p.A, p.B, lora.A, lora.B], (5, 3, 12))


def test_what_is_kept_is_a_chain_of_its_rank():
    assert keeps_what_it_says("peanut", "vit") is None


def test_the_start():
    model, tuned, term = made("rank=3, encoders=1", inp=400, out=300)
    x = torch.randn(5, 400, dtype=torch.float64)
    with tuned.disabled():
        want = model(x)
    assert torch.equal(model(x), want) and not term.B.any()
    for t, n in ((term.A, 300), (term.encoders[0], 3), (term.decoders[0], 3)):
        least, most = float(t.detach().min()), float(t.detach().max())
        assert 0.6 * n**-0.5 < most <= n**-0.5 and -n**-0.5 <= least < -0.6 * n**-0.5


def test_counts_defaults_and_refusals():
    place = Place("a", "weight", "linear", 3072, 768)
    assert burnish.parse("peanut(rank=8)")[0].count(place) == 2 * 8 * 3072
    assert burnish.parse("peanut(rank=8, encoders=3)")[0].count(place) == 2 * 8 * 3072 + 6 * 64
    assert burnish.parse("peanut(rank=8)")[0].per_token(place) == 8
    assert burnish.parse("peanut(rank=8)")[0].per_forward(place) == 8 * 3840
    assert burnish.parse("peanut")[0].settings() == {"targets": None, "rank": 32, "encoders": 0,
                                                     "act": "relu", "scale": 1.0}
    with pytest.raises(burnish.RecipeError, match="^peanut: encoders=-1"):
        burnish.parse("peanut(encoders=-1)")
    with pytest.raises(RankError, match="^peanut: rank 10"):
        made("rank=10")
    _, tuned, _ = made("rank=3, encoders=1")
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
