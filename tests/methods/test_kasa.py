"""KaSA: the least directions of a weight leave it, and triplets train in their place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.least import Cut, Graded, least
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, RankError, RecipeError
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing import follows
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}


def made(settings="rank=3, alpha=6, weight=0, ortho=0", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"kasa({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Graded)
    (_, cut), = tuned.terms(Cut)
    term.double(), cut.double()
    U, V = least(model[0].weight.detach(), 3)
    cut.U.copy_(U), cut.V.copy_(V)                   # in float64, as the reference
    return model, tuned, term


def kept(W, r):
    """The weight of its leading triplets, in an obvious way."""
    U, S, Vt = torch.linalg.svd(W)
    m = len(S) - r
    return sum(S[i] * torch.outer(U[:, i], Vt[i]) for i in range(m))


@pytest.mark.parametrize("inp, out", [(12, 9), (9, 12)])
def test_outputs_and_gradients_are_those_of_the_equation(inp, out):
    model, tuned, term = made(inp=inp, out=out)
    W, bias = kept(model[0].weight.detach().clone(), 3), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()
    follows(tuned, lambda x, A, E, B: F.linear(x, W + 2.0 * B @ torch.diag(E) @ A, bias),
            [term.A, term.E, term.B], (5, 3, inp))


def test_the_start_is_the_weight_without_its_least_directions():
    net, batch = tiny("llama")
    base = {n: m.weight.detach().clone() for n, m in net.named_modules()
            if n.endswith("_proj")}
    tuned = burnish.tune(net, "kasa(rank=4)", head=False)
    for name, _ in tuned.terms(Graded):
        layer = net.get_submodule(name.removesuffix(".weight"))
        W = base[name.removesuffix(".weight")]
        with torch.no_grad():
            got = layer(torch.eye(W.shape[1])).t()
        torch.testing.assert_close(got, kept(W, 4), rtol=1e-4, atol=1e-5)
        assert int(torch.linalg.matrix_rank(got, rtol=1e-4)) == min(W.shape) - 4
    merged = tuned.merge()
    torch.testing.assert_close(merged.get_submodule(name.removesuffix(".weight")).weight,
                               kept(W, 4), rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    tuned.detach()
    assert torch.equal(net.get_submodule(name.removesuffix(".weight")).weight, W)


def test_dropout_is_of_the_update_alone():
    model, tuned, term = made("rank=3, alpha=6, dropout=0.5, weight=0, ortho=0")
    W, bias = kept(model[0].weight.detach().clone(), 3), model[0].bias.detach().clone()
    x = torch.randn(7, 12, dtype=torch.float64)
    model.train()
    torch.testing.assert_close(model(x), F.linear(x, W, bias))       # B = 0: nothing to drop
    with torch.no_grad():
        term.B.normal_()
        torch.manual_seed(5)
        got = model(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)
        want = F.linear(x, W, bias) + 2.0 * F.linear(dropped, term.B @ torch.diag(term.E) @ term.A)
    torch.testing.assert_close(got, want)


def test_the_penalty_is_the_papers():
    """weight sum E^2 + ortho (||B^T B - I||_F + ||A A^T - I||_F), over all matrices."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)).double()
    tuned = burnish.tune(net, "kasa(rank=2, weight=0.3, ortho=0.7)", head=False, targets="0,1")
    terms = [t.double() for _, t in tuned.terms(Graded)]
    with torch.no_grad():
        for t in terms:
            t.B.normal_()
    x = torch.randn(4, 8, dtype=torch.float64)
    tuned.optimizer(lr=0.0)
    tuned.step((x, x[:, :5]), loss=lambda out, batch: out.sum() * 0)
    want = sum(0.3 * t.E.square().sum() + 0.7 * (
        (t.B.t() @ t.B - torch.eye(2).double()).norm()
        + (t.A @ t.A.t() - torch.eye(2).double()).norm()) for t in terms)
    params = [p for t in terms for p in (t.A, t.E, t.B)]
    grads = torch.autograd.grad(want, params)
    parts = list(burnish.parse("kasa(rank=2, weight=0.3, ortho=0.7)")[0].objective(tuned, None))
    total = sum(p.value() for p in parts)
    torch.testing.assert_close(total, want)
    for a, b in zip(torch.autograd.grad(total, params), grads, strict=True):
        torch.testing.assert_close(a, b)
    assert not list(burnish.parse("kasa(weight=0, ortho=0)")[0].objective(tuned, None))


def test_counts_on_a_published_shape():
    """Rank 8 of 4096 x 4096: 8 (4096 + 4096 + 1)."""
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (m,) = burnish.parse("kasa")
    assert sum(m.count(p) for p in match(anatomy, "q")) == 32 * 8 * (4096 + 4096 + 1)
    assert m.count(Place("a", "weight", "linear", 4096, 4096)) == 8 * 8193
    assert m.settings() == {"targets": None, "rank": 8, "alpha": 16.0, "dropout": 0.0,
                            "weight": 1e-4, "ortho": 1e-3}


def test_a_file_holds_what_left(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "kasa(rank=2, targets='q')", head=False)
    tuned.step(batch)
    with torch.no_grad():
        want = net(**batch).logits
    tuned.save(tmp_path)
    again = burnish.load(tiny("llama")[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, want)


@pytest.mark.parametrize("settings, error, words", [
    ("rank=0", RankError, "the largest rank there is 7"), ("rank=8", RankError, "is 7"),
    ("dropout=1.0", RecipeError, "a probability"), ("weight=-1", RecipeError, "0 or more"),
    ("ortho=-1", RecipeError, "0 or more")])
def test_what_cannot_be_is_refused(settings, error, words):
    with pytest.raises(error, match=f"kasa.*{words}"):
        burnish.tune(nn.Sequential(nn.Linear(9, 8)), f"kasa({settings})", head=False, targets="0")
    for rank in (1, 7):                                    # the least and the largest
        burnish.tune(nn.Sequential(nn.Linear(9, 8)), f"kasa(rank={rank})", head=False, targets="0")


def test_a_weight_that_is_not_finite_is_refused():
    net = nn.Sequential(nn.Linear(9, 8))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError, match="0.weight"):
        burnish.tune(net, "kasa(rank=2)", head=False, targets="0")
