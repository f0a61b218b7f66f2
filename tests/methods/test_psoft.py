"""PSOFT: the principal subspace of a weight, turned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.between import Turned
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=4", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"psoft({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Turned)
    term.double()
    return model, tuned, term


def skewed(upper, r=4):
    Q, k = torch.zeros(r, r, dtype=upper.dtype), 0
    for i in range(r):
        for j in range(i + 1, r):
            Q[i, j], Q[j, i] = upper[0, k], -upper[0, k]
            k += 1
    return Q


def exact(upper):
    Q, eye = skewed(upper), torch.eye(4, dtype=torch.float64)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def series(upper):
    Q = skewed(upper)
    return torch.eye(4, dtype=torch.float64) + 2 * Q + 2 * Q @ Q + Q @ Q @ Q


def within(upper):
    Q = skewed(upper)
    size = Q.square().sum().sqrt()
    assert float(size.detach()) > 0.3
    return series(upper * (0.3 / size))


ONE = torch.ones(4, dtype=torch.float64)
CASES = {
    "": (lambda T, a, b: torch.diag(b) @ exact(T) @ torch.diag(a), "ab"),
    "gain_in=False": (lambda T, b: torch.diag(b) @ exact(T), "b"),
    "gain_out=False, gain_in=False": (lambda T: exact(T), ""),
    "terms=4, gain_out=False": (lambda T, a: series(T) @ torch.diag(a), "a"),
    "terms=4, bound=0.3": (lambda T, a, b: torch.diag(b) @ within(T) @ torch.diag(a), "ab"),
    "terms=4, bound=30": (lambda T, a, b: torch.diag(b) @ series(T) @ torch.diag(a), "ab"),
    "free=True": (lambda T, a, b: torch.diag(b) @ T @ torch.diag(a), "ab"),
    "free=True, balanced=True": (lambda T, a, b: torch.diag(b) @ T @ torch.diag(a), "ab"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_equation(case):
    between, gains = CASES[case]
    model, tuned, term = made(f"rank=4, {case}")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    L, R = U[:, :4] @ torch.diag(S[:4]), Vt[:4]
    if "balanced" in case:
        L, R = U[:, :4] @ torch.diag(S[:4]).sqrt(), torch.diag(S[:4]).sqrt() @ Vt[:4]
    stir(tuned, size=0.4)
    theta = [term.upper if term.T is None else term.T, *(getattr(term, g) for g in gains)]
    eye = torch.eye(4, dtype=torch.float64)
    follows(tuned, lambda x, *t: F.linear(x, W + L @ (between(*t) - eye) @ R, bias), theta,
            (5, 3, 12), rtol=1e-5, atol=1e-5)                          # vectors are held in fp32


def test_without_gains_angles_and_lengths_inside_the_subspace_stay():
    """W'^T W' of what the subspace holds turns with V alone: the columns of U S T keep theirs."""
    model, tuned, term = made("rank=4, gain_in=False, gain_out=False")
    stir(tuned, size=0.5)
    before = torch.linalg.svdvals(model[0].weight.detach())
    T = term.move().detach() + torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(T @ T.t(), torch.eye(4, dtype=torch.float64))
    after = tuned.merge()[0].weight.detach()
    torch.testing.assert_close(torch.linalg.svdvals(after)[4:], before[4:], rtol=1e-5, atol=1e-6)
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-6)


def test_the_start_and_the_file(tmp_path):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "psoft(rank=8)")
    assert torch.equal(net(**batch).logits, want)
    net.train()
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"upper", "a", "b", "L", "R"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_iterations_are_of_an_approximate_decomposition():
    exact, _, one = made("rank=4")
    _, _, rough = made("rank=4, iterations=1")
    _, _, fine = made("rank=4, iterations=40")
    off = [float((t.L @ t.R - one.L @ one.R).detach().norm()) for t in (rough, fine)]
    assert off[1] < 1e-5 < 1e-4


def test_no_vectors_are_made_beyond_those_of_its_values(monkeypatch):
    real = torch.linalg.svd

    def svd(W, full_matrices=True):
        assert not full_matrices
        return real(W, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    made("rank=4")


def test_counts_and_cost():
    place = Place("a", "weight", "linear", 768, 768)
    (method,) = burnish.parse("psoft")
    assert method.count(place) == 32 * 31 // 2 + 64 and method.per_token(place) == 32
    assert burnish.parse("psoft(rank=8, gain_in=False)")[0].count(place) == 28 + 8
    assert burnish.parse("psoft(rank=8, free=True, gain_out=False)")[0].count(place) == 72
    assert type(method).keeps_input is False and keeps_what_it_says("psoft", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_nothing_larger_than_the_weight_is_made(monkeypatch):
    """Of 300 x 8 there are eight singular vectors a side, not three hundred."""
    exact, sizes = torch.linalg.svd, []

    def seen(*args, **kw):
        out = exact(*args, **kw)
        sizes.extend(t.numel() for t in out)
        return out

    monkeypatch.setattr(torch.linalg, "svd", seen)
    made("rank=4", 8, 300)
    assert sizes and max(sizes) <= 8 * 300


@pytest.mark.parametrize("settings, words", [
    ("rank=1", "rank=1: nothing turns"), ("terms=1", "terms 0"), ("terms=-2", "terms 0"),
    ("bound=0.1", "in a series"), ("terms=4, bound=0", "bound > 0"),
    ("terms=4, bound=-1", "bound > 0"),
    ("free=True, terms=4", "free=True is none")])
def test_settings_that_are_none_are_refused(settings, words):
    with pytest.raises(burnish.RecipeError, match=f"^psoft: .*{words}"):
        burnish.parse(f"psoft({settings})")


def test_what_has_no_such_subspace_is_refused():
    assert burnish.parse("psoft(rank=2, terms=2, bound=0.5)")
    with pytest.raises(RankError, match="^psoft: rank 10"):
        made("rank=10")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError, match=r"0\.weight"):
        burnish.tune(model, "psoft(rank=2)", head=False, targets="0")
    assert burnish.parse("psoft")[0].settings() == {
        "targets": None, "rank": 32, "gain_in": True, "gain_out": True, "free": False,
        "balanced": False, "terms": 0, "bound": None, "iterations": 0}
