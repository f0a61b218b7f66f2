"""LoHa: the entrywise product of two products of low rank."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.hadamard import Hadamard
from burnish.blocks.weight.term import Term
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(base, settings="rank=3, alpha=6", targets="0"):
    tuned = burnish.tune(base, f"loha({settings})", head=False, targets=targets)
    (_, term), = tuned.terms(Hadamard)
    return tuned, term


def wild(tuned):
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()


def test_outputs_and_gradients_are_those_of_the_equation():
    model = nn.Sequential(nn.Linear(12, 10)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned, term = made(model)
    term.double()
    wild(tuned)
    follows(tuned, lambda x, B1, A1, B2, A2: F.linear(
        x, W + 2.0 * torch.einsum("or,ri,os,si->oi", B1, A1, B2, A2), bias),
        [*term.first, *term.second], (5, 4, 12))


def test_panels_are_pieces_of_the_whole():
    """A matrix larger than a panel is made and pulled piece by piece."""
    from burnish.blocks.weight import panels

    model = nn.Sequential(nn.Linear(64, 48)).double()
    tuned, term = made(model)
    term.double()
    wild(tuned)
    x = torch.randn(7, 64, dtype=torch.float64)

    def run():
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(tuned.parameters()))]

    want, panel = run(), panels.PANEL
    panels.PANEL = 48 * 5
    try:
        got = run()
    finally:
        panels.PANEL = panel
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_its_rank_is_up_to_the_square():
    tuned, term = made(nn.Sequential(nn.Linear(48, 48)), "rank=3")
    term.double()
    wild(tuned)
    assert int(torch.linalg.matrix_rank(term.dense())) == 9


def test_counts():
    assert burnish.parse("loha(rank=8)")[0].count(Place("a", "weight", "linear", 4096, 4096)) == \
        131_072


@pytest.mark.parametrize("kernel", [(3, 3), (5,), (2,)])
def test_kernels_by_a_core(kernel):
    """A_i[r, d, k] = sum_q T[r, q, k] V[q, d]."""
    layer = nn.Conv2d(6, 10, kernel) if len(kernel) == 2 else nn.Conv1d(6, 10, kernel[0])
    model = nn.Sequential(layer).double()
    W, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    tuned, term = made(model, "rank=2, alpha=2, tucker=True")
    term.double()
    wild(tuned)
    k = W[0, 0].numel()
    halves = [torch.einsum("or,rqk,qd->odk", B, T.view(2, 2, k), V)
              for B, T, V in (term.first, term.second)]
    delta = (halves[0] * halves[1]).view_as(W)
    x = torch.randn(2, 6, *(9 for _ in kernel), dtype=torch.float64)
    conv = F.conv2d if len(kernel) == 2 else F.conv1d
    torch.testing.assert_close(model(x), conv(x, W + delta, bias), rtol=1e-9, atol=1e-10)
    method = tuned.recipe[0]
    place = Place("0", "weight", "conv", 10, 6 * k, kernel=k)
    assert method.count(place) == sum(p.numel() for p in term.parameters()) == \
        2 * 2 * (10 + 2 * k + 6)


@pytest.mark.parametrize("layer, tucker", [(lambda: nn.Linear(12, 10), True),
                                           (lambda: nn.Conv1d(4, 10, 3), False)])
def test_a_core_is_asked_for_and_has_a_kernel(layer, tucker):
    model = nn.Sequential(layer()).double()
    W = model[0].weight.detach().clone()
    tuned, term = made(model, f"rank=2, alpha=6, tucker={tucker}")
    term.double()
    wild(tuned)
    (B1, A1), (B2, A2) = term.first, term.second             # no third
    assert A1.shape == A2.shape == (2, 12)
    want = W + 3 * ((B1 @ A1) * (B2 @ A2)).view_as(W)
    torch.testing.assert_close(tuned.merge()[0].weight, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tucker", [False, True])
def test_it_is_what_peft_computes(tucker):
    import peft

    base = nn.Sequential(nn.Conv2d(6, 10, 3) if tucker else nn.Linear(12, 10))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.LoHaConfig(
        r=2, alpha=6, target_modules=["0"], init_weights=False, use_effective_conv2d=tucker))
    tuned, term = made(ours, f"rank=2, alpha=6, tucker={tucker}")
    wild(tuned)
    held = {n.split("hada_")[1].split(".")[0]: p for n, p in theirs.named_parameters()
            if "hada_" in n}
    with torch.no_grad():
        for i, half in ((1, term.first), (2, term.second)):
            held[f"w{i}_a"].copy_(half[0].t() if tucker else half[0])
            held[f"w{i}_b"].copy_(half[-1])
            if tucker:
                held[f"t{i}"].copy_(half[1].view(2, 2, 3, 3))
    x = torch.randn(5, 6, 7, 7) if tucker else torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "loha(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    _, term = made(nn.Sequential(nn.Linear(400, 300)), "rank=8")
    (B1, A1), (B2, A2) = term.first, term.second
    assert not B2.any()
    for p, std in ((B1, 0.1), (A1, 1.0), (A2, 1.0)):
        assert float(p.detach().std()) == pytest.approx(std, rel=0.1)
    _, term = made(nn.Sequential(nn.Conv2d(300, 200, 3)), "rank=12, tucker=True")
    (B1, T1, V1), (B2, T2, V2) = term.first, term.second
    assert not B2.any()
    for p, std in ((B1, 0.1), (T1, 0.1), (V1, 1.0), (T2, 0.1), (V2, 1.0)):
        assert float(p.detach().std()) == pytest.approx(std, rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
            if any(p.numel() in (64, 128) for p in g["params"])} == {0.0}


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(burnish.RecipeError, match="^loha: rank=0"):
        burnish.parse("loha(rank=0)")
    assert burnish.parse("loha")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0,
                                                   "tucker": False, "rank_dropout": 0.0,
                                                   "module_dropout": 0.0}


def test_bounds_and_cost():
    assert keeps_what_it_says("loha", "vit") is None
    assert burnish.parse("loha")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert burnish.parse("loha(rank=1)")
    with pytest.raises(RankError, match="largest rank there is 5"):
        burnish.tune(nn.Sequential(nn.Linear(9, 5)), "loha(rank=6)", head=False, targets="0")
    place = Place("0", "weight", "conv", 16, 32, kernel=2)
    assert burnish.parse("loha(rank=1, tucker=True)")[0].count(place) == 2 * (16 + 2 + 16)


@pytest.mark.parametrize("word", ["rank_dropout", "module_dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"loha(rank=2, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^loha: {word} is a probability"):
            burnish.parse(f"loha({word}={p})")
    assert term.rescale
