"""HUT: the weight times one plus a thin product, entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.ofw.hut import Weighed
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3, alpha=6", inp=12, out=9, conv1d=False):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, inp) if conv1d else nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"hut({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Weighed)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()
    follows(tuned, lambda x, A, B: F.linear(
        x, W * (1 + 2.0 * torch.einsum("or,ri->oi", B, A)), bias), [term.A, term.B], (5, 3, 12))


@pytest.mark.parametrize("beside", [False, True, "conv1d"])
def test_with_dropout_the_base_sees_x_and_the_rest_less_of_it(beside):
    turned = beside == "conv1d"                  # it holds the transpose
    model, tuned, term = made("rank=3, alpha=6, dropout=0.4", conv1d=turned)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    W = W.t().contiguous() if turned else W
    model[0].weight.requires_grad_(bool(beside))
    with torch.no_grad():
        term.B.normal_()
    x = torch.randn(5, 3, 12, dtype=torch.float64, requires_grad=True)
    A, B = (t.detach().clone().requires_grad_() for t in (term.A, term.B))
    V = W.clone().requires_grad_()
    torch.manual_seed(4)
    want = F.linear(x, V, bias) + F.linear(F.dropout(x, 0.4), V * (2.0 * B @ A))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    got = model(x)
    assert torch.equal(torch.get_rng_state(), state)     # the next layer draws another mask
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    mine = [x, term.A, term.B, *([model[0].weight] if beside else [])]
    own = list(torch.autograd.grad(got, mine, g))
    own = [*own[:3], *(t.t() if turned else t for t in own[3:])]
    for a, b in zip(own,
                    torch.autograd.grad(want, [x, A, B, *([V] if beside else [])], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model.eval()
    torch.testing.assert_close(model(x), F.linear(x, W * (1 + 2.0 * B @ A), bias))


def test_a_base_that_changed_since_the_forward_is_refused_under_dropout():
    model, _, term = made("rank=3, alpha=6, dropout=0.4")
    with torch.no_grad():
        term.B.normal_()
    y = model(torch.randn(5, 12, dtype=torch.float64)).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()


def test_no_other_part_can_drop_under_it():
    with pytest.raises(burnish.RecipeError, match="cannot act under a function of the whole weig"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "hut(rank=2, dropout=0.1) + "
                     "lora(rank=2, dropout=0.1)", targets="0", head=False)


def test_it_merges_and_costs_the_same_whatever_the_tokens():
    """r in out operations, where LoRA's are tokens r (in + out): as many at in out / (in + out)
    tokens, 512 of them at 1024 x 1024."""
    model, tuned, term = made()
    with torch.no_grad():
        term.B.normal_()
    x = torch.randn(5, 12, dtype=torch.float64)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    want = F.linear(x, W * (1 + 2.0 * term.B.detach() @ term.A.detach()), bias)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-10, atol=1e-12)

    def products(tokens):
        net = nn.Sequential(nn.Linear(64, 64, bias=False))
        burnish.tune(net, "hut(rank=4)", head=False, targets="0")
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(tokens, 64, requires_grad=True))
        return counter.get_total_flops() - 2 * tokens * 64 * 64

    assert products(8) == products(800) == 2 * 4 * 64 * 64 == 2 * 32 * 4 * (64 + 64)
    assert 1024 * 1024 == 512 * (1024 + 1024)


def test_zeros_stay_and_the_rank_is_not_bound():
    model, _, term = made(inp=16, out=16)
    with torch.no_grad():
        model[0].weight[3, 5] = 0
        term.B.normal_()
    W = model[0].weight.detach()
    change = term.of(W) - W
    assert change[3, 5] == 0 and int(torch.linalg.matrix_rank(change)) == 16


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "hut(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    (method,) = burnish.parse("hut")
    assert 48 * method.count(Place("a", "weight", "linear", 1024, 1024)) == 786_432
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == 0
    assert keeps_what_it_says("hut", "vit") is None
    _, tuned, term = made(inp=400)
    A = term.A.detach()
    assert -400**-0.5 <= float(A.min()) < -0.045 and 0.045 < float(A.max()) <= 400**-0.5
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_refusals():
    with pytest.raises(RankError, match="^hut: rank 10"):
        made("rank=10")
    assert burnish.parse("hut(targets='q')")[0].claims() == ("the function of W on q",)
    assert burnish.parse("hut")[0].claims() == ("the function of W on the default targets",)
    assert burnish.parse("hut")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0,
                                                  "dropout": 0.0}


@pytest.mark.parametrize("word", ["dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"hut(rank=3, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^hut: {word} is a probability"):
            burnish.parse(f"hut({word}={p})")
