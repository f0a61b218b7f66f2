"""DoRA: direction and length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def test_count_on_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse("dora(rank=32)")
    places = match(anatomy, "q,k,v,up,down")
    assert sum(method.count(p) for p in places) == 56_975_360
    assert sum(p.out for p in places) == 876_544
    whole = sum(p.numel() for p in anatomy.model.parameters())
    assert 100 * 56_975_360 / (whole + 56_975_360) == pytest.approx(0.84, abs=5e-3)


def stirred(recipe="dora(rank=4)"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24)).double()
    tuned = burnish.tune(model, recipe)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return tuned, dict(tuned.terms(Chain))["0.weight"], dict(tuned.terms(Magnitude))["0.weight"]


def test_gradient_with_the_norm_as_a_constant():
    """dV = diag(m / c) dW', dm = rowsum(dW' * V) / c."""
    tuned, chain, magnitude = stirred()
    linear = tuned.model[0]
    for t in (chain, magnitude):
        t.double()
    x, g = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    wanted = [chain.A, chain.B, magnitude.m]
    got = torch.autograd.grad(tuned.model(x), wanted, g)
    V = linear.weight + chain.scale * chain.B @ chain.A
    c = V.norm(dim=1).detach()
    dW = g.t() @ x
    dV = (magnitude.m / c)[:, None] * dW
    want = (chain.scale * chain.B.t() @ dV, chain.scale * dV @ chain.A.t(), (dW * V).sum(1) / c)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_bias_is_not_scaled():
    tuned, chain, magnitude = stirred()
    x = torch.zeros(2, 16, dtype=torch.float64)
    assert torch.equal(tuned.model(x)[0], tuned.model[0].bias)


def test_the_length_of_the_direction_gets_no_gradient():
    """W' does not change when V is stretched; with c held constant the gradient along V stays."""
    tuned, chain, magnitude = stirred()
    W = tuned.model[0].weight
    torch.testing.assert_close(magnitude.of(W), magnitude.of(3 * W))


def test_merge():
    tuned, *_ = stirred()
    x = torch.randn(3, 16, dtype=torch.float64)
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-6, atol=1e-7)


def test_convolutions_take_the_norm_over_the_whole_kernel():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    tuned = burnish.tune(conv, "dora(rank=4)", targets="conv")
    (_, magnitude), = tuned.terms(Magnitude)
    torch.testing.assert_close(magnitude.m.detach(), conv[0].weight.detach().flatten(1).norm(dim=1))
    with torch.no_grad():
        magnitude.m.mul_(2)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, 2 * conv[0].weight, padding=1),
                               rtol=1e-5, atol=1e-6)


def test_lengths_come_from_the_stored_form_of_a_quantised_base():
    model, _ = tiny("llama", hidden_size=64, intermediate_size=64)
    tuned = burnish.tune(model, "nf4 + dora(rank=4)", targets="q", head=False)
    for name, magnitude in tuned.terms(Magnitude):
        stored = model.get_submodule(name.removesuffix(".weight")).weight.detach()
        torch.testing.assert_close(magnitude.m.detach(), stored.norm(dim=1), rtol=1e-6, atol=1e-6)


def test_two_functions_of_one_weight_are_refused():
    with pytest.raises(RecipeError, match="cannot be joined"):
        parse("dora + dora(rank=4)")


def test_decay_leaves_lengths_alone():
    tuned, *_ = stirred()
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0]


def test_defaults_are_the_published_ones():
    assert parse("dora")[0].settings() == {"targets": None, "rank": 8, "alpha": 16.0,
                                           "scaling": "lora", "dropout": 0.0,
                                           "drop_base": False, "hold_norm": True, "train_a": True,
                                           "b_rate": 1.0}


def test_the_equation_written_out():                                       # findings 6
    """y = x (diag(m / c) V)^T + b, V = W + (alpha / rank) B A, c its row norms, a constant."""
    tuned, chain, magnitude = stirred("dora(rank=4, alpha=12)")
    for t in (chain, magnitude):
        t.double()
    linear, (A, B, m) = tuned.model[0], (chain.A, chain.B, magnitude.m)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 24, dtype=torch.float64)
    V = linear.weight + 3.0 * B @ A
    c = V.detach().square().sum(1).sqrt()
    y = x @ ((m / c)[:, None] * V).t() + linear.bias
    got = tuned.model(x)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (A, B, m, x), g),
                    torch.autograd.grad(y, (A, B, m, x), g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


def test_a_length_of_zero_gradient_is_a_zero_gradient():                   # findings 6
    """Stretching V along itself moves nothing: the whole gradient of a stretch of A and B is
    carried by m alone, which stays where rows of the update are orthogonal to dW'."""
    tuned, chain, magnitude = stirred()
    for t in (chain, magnitude):
        t.double()
    V = (tuned.model[0].weight + chain.scale * chain.B @ chain.A).detach()
    x = torch.eye(16, dtype=torch.float64)
    # a loss that depends on directions alone: dW' is orthogonal to every row of V
    G = torch.randn(24, 16, dtype=torch.float64)
    G -= (G * V).sum(1, keepdim=True) / V.square().sum(1, keepdim=True) * V
    (dm,) = torch.autograd.grad(tuned.model(x), magnitude.m, G.t())
    torch.testing.assert_close(dm, torch.zeros(24, dtype=torch.float64), rtol=0, atol=1e-12)
    (dm,) = torch.autograd.grad(tuned.model(x), magnitude.m, V.t())
    torch.testing.assert_close(dm, V.square().sum(1) / V.norm(dim=1), rtol=1e-10, atol=1e-12)


def test_the_count_of_a_matrix():
    from burnish.core.site import Place

    method = parse("dora(rank=4)")[0]
    assert method.count(Place("l", "weight", "linear", 24, 16)) == 4 * (24 + 16) + 24
    assert method.per_token(Place("l", "weight", "linear", 24, 16)) == 4


def test_targets_name_the_resource():
    with pytest.raises(RecipeError, match="the function of W on q,v"):
        parse("dora(targets='q,v') + dora(rank=4, targets='q,v')")
    assert len(parse("dora(targets='q') + dora(rank=4, targets='v')")) == 2


@pytest.mark.parametrize("trained", [False, True])
def test_all_that_differs_from_the_base_sees_the_dropped_input(trained):
    """``y = W x + (W' - W) drop(x) + b``, the lengths of W + s B A held constant."""
    tuned, chain, magnitude = stirred("dora(rank=4, alpha=12, dropout=0.4, drop_base=True)")
    assert chain.dropout == 0 and magnitude.dropout == 0.4
    for t in (chain, magnitude, tuned.model):
        t.double()
    linear = tuned.model[0]
    linear.weight.requires_grad_(trained)
    tuned.model.train()
    x = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)
    mine = [chain.A, chain.B, magnitude.m, *([linear.weight] if trained else [])]
    A, B, m, *W = (t.detach().clone().requires_grad_() for t in mine)
    W = W[0] if trained else linear.weight.detach()
    V = W + 3.0 * B @ A
    torch.manual_seed(2)
    xd = F.dropout(x, 0.4)
    c = torch.linalg.vector_norm(V, dim=1).detach()
    want = F.linear(x - xd, W, linear.bias) + F.linear(xd, (m / c)[:, None] * V)
    torch.manual_seed(2)
    got = tuned.model(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    g = torch.randn_like(want)
    theirs = [x, A, B, m, *([W] if trained else [])]
    for a, b in zip(torch.autograd.grad(got, [x, *mine], g), torch.autograd.grad(want, theirs, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    tuned.model.eval()
    torch.testing.assert_close(tuned.model(x), F.linear(x, (m / c)[:, None] * V, linear.bias))
    other = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "dora(rank=2, dropout=0.4)",
                         targets="0", head=False)
    ((_, inner),), ((_, length),) = (other.terms(type(t)) for t in (chain, magnitude))
    assert (inner.dropout, length.dropout) == (0.4, 0.0), "one of them drops"


@pytest.mark.parametrize("settings, word", [("rank=17", "rank"), ("dropout=1.0", "dropout"),
                                            ("dropout=-0.1", "dropout")])
def test_settings_that_make_no_sense(settings, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), f"dora({settings})")


def test_rank_stabilised_scale_frozen_a_and_the_rate_of_b():               # findings 3.9
    tuned, chain, magnitude = stirred(
        "dora(rank=4, alpha=12, scaling='rs', train_a=False, b_rate=4.0)")
    for t in (chain, magnitude):
        t.double()
    linear, (A, B, m) = tuned.model[0], (chain.A, chain.B, magnitude.m)
    assert not A.requires_grad
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 24, dtype=torch.float64)
    V = linear.weight + 6.0 * B @ A                          # 12 / sqrt(4)
    y = x @ ((m / V.detach().square().sum(1).sqrt())[:, None] * V).t() + linear.bias
    got = tuned.model(x)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (B, m, x), g), torch.autograd.grad(y, (B, m, x), g),
                    strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)
    rates = {n.rpartition(".")[2]: gr["lr"] for gr in tuned.optimizer(lr=1e-3).param_groups
             for p in gr["params"] for n, q in tuned.named_parameters() if q is p}
    assert rates == {"B": pytest.approx(4e-3), "m": pytest.approx(1e-3)}
    assert sum(p.numel() for p in tuned.parameters()) == 4 * 24 + 24


# -- embeddings ------------------------------------------------------------------------------------
def table(padding=None, dtype=torch.float64, recipe="dora(rank=3)"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=padding)).to(dtype)
    with torch.no_grad():
        model[0].weight.normal_()                        # the row of padding too
    W = model[0].weight.detach().clone()
    tuned = burnish.tune(model, recipe, targets="0", head=False)
    chain, length = dict(tuned.terms(Chain))["0.weight"], dict(tuned.terms(Magnitude))["0.weight"]
    for t in (chain, length):
        t.double()
        for p in t.parameters():
            p.data += torch.randn(p.shape, dtype=torch.float64) * 0.3
    return tuned, chain, length, W


@pytest.mark.parametrize("padding", [None, 4])
def test_an_embedding_has_a_length_per_coordinate(padding):                # findings 3.9
    """y = m / c * (W + s A^T B^T)[index], c the lengths of the 6 coordinates over the vocabulary;
    no gradient from the row of padding."""
    tuned, chain, length, W = table(padding)
    assert length.m.shape == (6,) and sum(p.numel() for p in tuned.parameters()) == 3 * 17 + 6
    index, g = torch.tensor([[1, 4, 1], [10, 0, 4]]), torch.randn(2, 3, 6, dtype=torch.float64)
    got = tuned.model(index)
    A, B, m = (t.detach().clone().requires_grad_() for t in (chain.A, chain.B, length.m))
    V = W + chain.scale * (B @ A).t()
    c = V.detach().norm(dim=0)
    want = F.embedding(index, m / c * V, padding)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, [chain.A, chain.B, length.m], g),
                    torch.autograd.grad(want, [A, B, m], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tuned.merge()[0].weight, (m / c * V).detach(), rtol=1e-12,
                               atol=1e-12)
    tuned.unmerge()
    assert torch.equal(tuned.model[0].weight, W)


def test_an_embedding_that_trains_itself_gets_its_gradient_through_the_gain():
    tuned, chain, length, W = table(recipe="dora(rank=3) + full(targets='0')")
    index, g = torch.tensor([1, 4, 1, 10]), torch.randn(4, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad(tuned.model(index), tuned.model[0].weight, g)
    leaf = W.clone().requires_grad_()
    V = leaf + chain.scale * (chain.B @ chain.A).t().detach()
    want = F.embedding(index, length.m.detach() / V.detach().norm(dim=0) * V)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaf, g)[0], rtol=1e-10, atol=1e-12)


def test_an_embedding_starts_where_it_was_and_comes_back_from_a_folder(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3))
    base, index = model[0].weight.detach().clone(), torch.randint(0, 11, (2, 5))
    tuned = burnish.tune(model, "dora(rank=3)", targets="0", head=False)
    torch.testing.assert_close(model[0](index), base[index], rtol=1e-6, atol=1e-7)
    tuned.optimizer(lr=0.1)
    for _ in range(3):
        tuned.step((index, torch.zeros(2, 5, 3)), loss=lambda out, b: (out - b[1]).square().mean())
    want = model(index)
    tuned.save(tmp_path / "a")
    assert torch.equal(tuned.detach()[0].weight, base)
    assert torch.equal(burnish.load(model, tmp_path / "a").model(index), want)


def test_a_look_up_keeps_nothing_per_token():
    """Between forward and backward: the index is there anyway; lengths, and no rows."""
    from burnish.memory import Ledger

    kept = []
    for rows in (64, 640):
        model, index = nn.Sequential(nn.Embedding(50, 32)), torch.randint(0, 50, (rows,))
        tuned = burnish.tune(model, "dora(rank=3) + lean(on=False)", targets="0", head=False)
        with Ledger(model) as ledger:
            ledger.watch("weights", [index])
            out = tuned.model(index)
            total = out.sum()
            del out
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights"))
        total.backward()
        assert all(p.grad is not None for p in tuned.parameters())
    assert kept[0] == kept[1] < 64 * 32 * 4


def test_a_gain_near_one_counts_in_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64).to(torch.bfloat16))
    tuned = burnish.tune(model, "dora(rank=2)", targets="0", head=False)
    index, W = torch.arange(50), model[0].weight.detach().clone()
    with torch.no_grad():
        dict(tuned.terms(Magnitude))["0.weight"].m.mul_(1.003)
    want = (W.double() * 1.003).to(torch.bfloat16)
    got = tuned.model(index)
    assert got.dtype == torch.bfloat16
    assert float((got == want).double().mean()) > 0.95 and not torch.equal(got, W)


def test_functional_call_and_weights_changed_before_backward():
    tuned, chain, length, W = table()
    index = torch.tensor([1, 4])
    names = {n: p for n, p in tuned.model.named_parameters()}
    moved = {n: p + 0.1 if "burnish" in n else p for n, p in names.items()}
    got = torch.func.functional_call(tuned.model, moved, (index,))
    A, B, m = chain.A + 0.1, chain.B + 0.1, length.m + 0.1
    V = W + chain.scale * (B @ A).t()
    torch.testing.assert_close(got, (m / V.norm(dim=0) * V)[index])
    y = tuned.model(index)
    with torch.no_grad():
        length.m.add_(1)
    with pytest.raises(RuntimeError, match="modified in place after the forward"):
        y.sum().backward()


def test_a_rate_that_is_none_and_what_trains_without_a():
    with pytest.raises(RecipeError, match="dora: b_rate multiplies a learning rate"):
        parse("dora(b_rate=0)")
    (method,) = parse("dora(rank=3, train_a=False)")
    assert method.count(Place("x", "weight", "linear", 7, 5)) == 3 * 7 + 7
    assert method.per_token(Place("x", "weight", "linear", 7, 5)) == 3
    assert parse("dora(hold_norm=False)")[0].per_token(Place("x", "weight", "linear", 7, 5)) == 0


def test_norms_may_be_differentiated():
    """``hold_norm=False``: the gradient of ``m V / ||V||`` by autograd, in float64."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=torch.float64))
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, "dora(rank=2, hold_norm=False)", head=False)
    named = dict(tuned.named_parameters())
    for p in named.values():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    A, B, m = (next(p for p in named.values() if tuple(p.shape) == s).detach().clone()
               .requires_grad_() for s in ((2, 6), (5, 2), (5,)))
    x, s = torch.randn(4, 6, dtype=torch.float64), 8.0
    V = W + s * B @ A
    want = torch.autograd.grad((x @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).t()
                                + net[0].bias).square().sum(), (A, B, m))
    net(x).square().sum().backward()
    for g in want:
        got = next(p.grad for p in named.values() if p.shape == g.shape)
        torch.testing.assert_close(got, g, rtol=1e-9, atol=1e-9)
    with pytest.raises(burnish.RecipeError, match="set dropout=0"):
        burnish.tune(net, "dora(hold_norm=False, dropout=0.1)")


def test_a_row_of_noughts_has_no_direction_to_hold():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    net[0].weight.data[2] = 0
    tuned = burnish.tune(net, "dora(rank=2, hold_norm=False)", head=False)
    net(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in tuned.parameters())
