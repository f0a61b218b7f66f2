"""BOFT: a butterfly of block rotations, against its matrices multiplied out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import butterfly
from burnish.blocks.weight.butterfly import Butterfly, Gained
from burnish.blocks.weight.rotation import added
from burnish.blocks.weight.term import Term
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def dealt(inp, block, i):
    """P_i: within runs of 2^i blocks, the half-blocks with even numbers first, then the odd."""
    half, order = block // 2, []
    for start in range(0, inp, block * 2**i):
        halves = range(2 * 2**i)
        for h in [*halves[0::2], *halves[1::2]]:
            order += range(start + h * half, start + (h + 1) * half)
    return torch.eye(inp, dtype=torch.float64)[order]


def rotation(term, inp, upper):
    """R = F_m .. F_1."""
    b, blocks, R = term.block, inp // term.block, torch.eye(inp, dtype=torch.float64)
    eye = torch.eye(b, dtype=torch.float64)
    for i in range(term.factors):
        made = []
        for flat in upper[i * blocks:(i + 1) * blocks]:
            Q = torch.zeros(b, b, dtype=torch.float64)
            Q = Q.index_put(tuple(torch.triu_indices(b, b, 1)), flat)
            Q = Q - Q.t()
            made.append((eye + Q) @ torch.linalg.inv(eye - Q))
        P = dealt(inp, b, i)
        R = P @ torch.block_diag(*made) @ P.t() @ R
    return R


@pytest.mark.parametrize("wide", [64, 4], ids=["factors as one", "factor by factor"])
@pytest.mark.parametrize("block, factors", [(4, 1), (4, 2), (4, 3), (8, 2), (2, 4)])
def test_outputs_and_gradients_are_those_of_the_matrices(block, factors, wide, monkeypatch):
    monkeypatch.setattr(butterfly, "WIDE", wide)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 9)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, f"boft(block={block}, factors={factors})", head=False, targets="0")
    (_, term), = tuned.terms(Butterfly)
    term.double()
    with torch.no_grad():
        term.upper.normal_()
    follows(tuned, lambda x, upper: F.linear(x, W @ rotation(term, 16, upper).t(), bias),
            [term.upper], (5, 3, 16))
    R = rotation(term, 16, term.upper)
    torch.testing.assert_close(R @ R.t(), torch.eye(16, dtype=torch.float64), atol=1e-10, rtol=0)
    turned = tuned.merge()[0].weight.detach()
    torch.testing.assert_close(turned @ turned.t(), W @ W.t(), atol=1e-9, rtol=0)
    assert float((turned - W).abs().max()) > 0.1
    assert tuned.recipe[0].count(Place("0", "weight", "linear", 9, 16)) == term.upper.numel()


def test_a_small_turn_is_not_lost_beside_the_identity():
    """To the precision of the turn, not of what it is added to; in half precision as well."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 4)), "boft(block=4, factors=3)", head=False,
                         targets="0")
    (_, term), = tuned.terms(Butterfly)
    with torch.no_grad():
        term.upper.normal_().mul_(1e-6)
        D = torch.block_diag(*term.own())
        want = rotation(term.double(), 16, term.upper.double()) - torch.eye(16).double()
    torch.testing.assert_close(D.double(), want, rtol=1e-4, atol=1e-11)
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    moved = added(x, term.float().own()).double()
    torch.testing.assert_close(moved, x.double() @ want, rtol=0.05, atol=1e-7)


def test_enough_factors_join_every_input_with_every_other():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 4)).double(), "boft(block=4, factors=3)",
                         head=False, targets="0")
    (_, term), = tuned.terms(Butterfly)
    term.double()
    with torch.no_grad():
        term.upper.normal_()
    assert bool((rotation(term, 16, term.upper) != 0).all())


def test_one_factor_is_oft():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 9))
    other, x = copy.deepcopy(base), torch.randn(3, 16)
    a = burnish.tune(base, "boft(block=4, factors=1)", head=False, targets="0")
    b = burnish.tune(other, "oft(block=4)", head=False, targets="0")
    (p,), (q,) = a.parameters(), b.parameters()
    with torch.no_grad():
        p.normal_()
        q.copy_(p)
    assert torch.equal(base(x), other(x))


def test_the_series_is_near_the_solve():
    """R = I + 2 Q + 2 Q^2 + ...: with few terms it is off by what is left out."""
    base, x = nn.Sequential(nn.Linear(16, 9)).double(), torch.randn(3, 16, dtype=torch.float64)
    ends = []
    for terms in (0, 8):
        net = copy.deepcopy(base)
        tuned = burnish.tune(net, f"boft(block=4, terms={terms})", head=False, targets="0")
        (_, term), = tuned.terms(Butterfly)
        term.double()
        with torch.no_grad():
            term.upper.fill_(0.02)
        ends.append(net(x))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    assert not torch.equal(*ends)


def test_it_is_what_peft_computes():
    """peft's skew matrices have the other sign, and its outputs a gain that starts at one. (Without
    CUDA it has one factor; how it wires more is the next test.)"""
    import peft

    base = nn.Sequential(nn.Linear(16, 10))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"]))
    tuned = burnish.tune(ours, "boft(block=4, factors=1)", head=False, targets="0")
    (_, term), = tuned.terms(Butterfly)
    (held,) = [p for n, p in theirs.named_parameters() if "boft_R" in n]
    with torch.no_grad():
        term.upper.normal_()
        held.copy_(-term.skew().view_as(held))
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_gain_stands_behind_the_product_not_behind_the_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 9)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, "boft(block=4, factors=2, gains=True)", head=False, targets="0")
    (_, term), = tuned.terms(Gained)
    assert torch.equal(term.s, torch.ones(9))
    term.double()
    with torch.no_grad():
        term.upper.normal_()
        term.s.normal_()
    follows(tuned, lambda x, upper, s: F.linear(
        x, s[:, None] * (W @ rotation(term, 16, upper).t()), bias), [term.upper, term.s],
        (5, 3, 16))
    assert tuned.recipe[0].count(Place("0", "weight", "linear", 9, 16)) == 2 * 4 * 6 + 9
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_it_is_wired_as_peft_wires_it():
    from peft.tuners.boft.layer import BOFTLayer

    for inp, block, factors in ((16, 4, 3), (64, 8, 3), (64, 2, 6)):
        for i in range(factors):
            order = BOFTLayer.block_butterfly_perm(None, inp, inp // block // 2**i, block // 2,
                                                   factors - 1)
            assert torch.equal(torch.eye(inp, dtype=torch.float64)[order], dealt(inp, block, i))


def test_counts():
    (method,) = burnish.parse("boft(block=8, factors=2)")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 28_672


def test_the_start_is_the_base():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "boft(block=4)")
    assert torch.equal(net(**batch).logits, want)


def test_inputs_that_cannot_be_wired_are_refused():
    with pytest.raises(burnish.RecipeError, match="16 does not divide the 24 inputs of 0"):
        burnish.tune(nn.Sequential(nn.Linear(24, 4)), "boft(block=8)", head=False, targets="0")


@pytest.mark.parametrize("settings", ["block=1, factors=1", "factors=0", "terms=1", "terms=-1",
                                      "block=3"])
def test_settings_that_make_no_butterfly_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^boft"):
        burnish.parse(f"boft({settings})")


@pytest.mark.parametrize("settings", ["block=2", "terms=2", "block=3, factors=1"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"boft({settings})")


def test_defaults_and_no_decay():
    assert burnish.parse("boft")[0].settings() == {"targets": None, "block": 8, "factors": 2,
                                                   "terms": 0, "gains": False,
                                                   "block_dropout": 0.0}
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "boft", targets="0", head=False)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_bounds_and_cost():
    assert keeps_what_it_says("boft", "vit") is None
    assert burnish.parse("boft")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert burnish.parse("boft(targets='q')")[0].claims() == ("the function of W on q",)
    assert burnish.parse("boft")[0].claims() == ("the function of W on the default targets",)


@pytest.mark.parametrize("word", ["block_dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"boft(block=4, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^boft: {word} is a probability"):
            burnish.parse(f"boft({word}={p})")


@pytest.mark.parametrize("gains", [False, True])
def test_blocks_of_one_factor_stay_where_they_are(gains):
    model = nn.Sequential(nn.Linear(16, 12)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    tuned = burnish.tune(model, f"boft(block=4, factors=2, gains={gains}, block_dropout=0.5)",
                         targets="0", head=False)
    (_, term), = tuned.terms(Gained if gains else Butterfly)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_(std=0.3)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        turns = term.draw()
        assert turns.shape == (8, 1) and turns.sum() == 6
        seen.add(int((turns[:4] == 0).sum()))
        x = torch.randn(5, 16, dtype=torch.float64)
        torch.manual_seed(seed)
        got = model(x)
        g = torch.randn_like(got)
        grads = torch.autograd.grad(got, list(tuned.parameters()), g)
        still = copy.deepcopy(term).eval()
        with torch.no_grad():
            still.upper.mul_(turns)
        want = F.linear(x, still.of(W), bias)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        back = torch.autograd.grad(want, list(still.parameters()), g)
        torch.testing.assert_close(grads[0], back[0] * turns, rtol=1e-10, atol=1e-12)
        for a, b in zip(grads[1:], back[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert seen == {0, 2}
