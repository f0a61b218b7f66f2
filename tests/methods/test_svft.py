"""SVFT: a sparse matrix between the singular vectors of a weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.between import Patterned
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"svft({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Patterned)
    term.double()
    return model, tuned, term


@pytest.mark.parametrize("settings", ["", "band=1", "pattern='plain'", "pattern='random'",
                                      "band=40"])
def test_outputs_and_gradients_are_those_of_the_equation(settings):
    model, tuned, term = made(settings)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        term.values.normal_()
    rows, columns = zip(*((at // 9, at % 9) for at in term.index.tolist()), strict=True)

    def equation(x, values):
        M = torch.zeros(9, 9, dtype=torch.float64).index_put(
            (torch.tensor(rows), torch.tensor(columns)), values)
        return F.linear(x, U @ (torch.diag(S) + M) @ Vt, bias)

    follows(tuned, equation, [term.values], (5, 3, 12), rtol=1e-5, atol=1e-5)  # vectors in fp32
    assert tuned.recipe[0].count(Place("0", "weight", "linear", 9, 12)) == term.values.numel()


def test_patterns():
    def cells(settings):
        index = made(settings)[2].index.tolist()
        assert index == sorted(set(index))
        return {(i // 9, i % 9) for i in index}

    diagonal = {(i, i) for i in range(9)}
    assert cells("pattern='plain'") == diagonal
    assert cells("band=2") == {(i, j) for i in range(9) for j in range(9) if abs(i - j) <= 2}
    assert cells("band=8") == cells("band=9") == {(i, j) for i in range(9) for j in range(9)}
    drawn = cells("pattern='random'")
    assert diagonal < drawn and len(drawn) == len(cells("band=2"))
    assert cells("pattern='random', band=8") == cells("band=8")
    assert drawn != cells("pattern='random', seed=1") and drawn == cells("pattern='random'")


def test_an_aligned_pattern_is_of_the_vectors_that_point_the_same_way(tmp_path):
    _, _, term = made("pattern='aligned', band=1", inp=9)
    torch.manual_seed(0)
    W = nn.Linear(9, 9).double().weight.detach()
    U, _, Vt = torch.linalg.svd(W)
    cosines = {(i, j): abs(float(U[:, i] @ Vt[j])) for i in range(9) for j in range(9)}
    want = sorted(cosines, key=lambda at: -cosines[at])[: 3 * 9 - 2]
    assert {(i // 9, i % 9) for i in term.index.tolist()} == set(want)
    assert term.index.tolist() == sorted(term.index.tolist())
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "svft(pattern='aligned', band=1, targets='q,o')", head=False)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    for (_, a), (_, b) in zip(tuned.terms(Patterned), again.terms(Patterned), strict=True):
        assert torch.equal(a.index, b.index)
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    with pytest.raises(burnish.RecipeError, match=r"those of 0.weight \(9 x 12\) differ in length"):
        made("pattern='aligned'")


def test_nothing_larger_than_the_weight_is_made(monkeypatch):
    """Of 8 x 300 there are eight singular vectors a side, not three hundred."""
    exact, sizes = torch.linalg.svd, []

    def seen(*args, **kw):
        out = exact(*args, **kw)
        sizes.extend(t.numel() for t in out)
        return out

    monkeypatch.setattr(torch.linalg, "svd", seen)
    burnish.tune(nn.Sequential(nn.Linear(300, 8)), "svft", targets="0", head=False)
    assert sizes and max(sizes) <= 8 * 300


def test_counts():
    def count(settings, out, inp):
        return burnish.parse(f"svft({settings})")[0].count(Place("a", "weight", "linear", out, inp))

    assert count("pattern='plain'", 768, 3072) == 768
    assert count("band=2", 768, 768) == 5 * 768 - 6
    assert count("band=1", 1, 5) == 1
    (method,) = burnish.parse("svft")
    assert method.per_token(Place("a", "weight", "linear", 9, 12)) == 9
    assert type(method).keeps_input is False and keeps_what_it_says("svft", "vit") is None


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "svft")
    assert torch.equal(net(**batch).logits, want)
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("settings, what", [
    ("band=0", "band=0"), ("pattern='plain', band=3", "band does nothing"),
    ("seed=3", "seed does nothing"), ("pattern='plain', seed=3", "seed does nothing")])
def test_what_does_nothing_is_refused(settings, what):
    with pytest.raises(burnish.RecipeError, match=what):
        burnish.parse(f"svft({settings})")


def test_defaults():
    place = Place("a", "weight", "linear", 9, 9)
    assert burnish.parse("svft(pattern='aligned')")[0].count(place) == 5 * 9 - 6
    assert burnish.parse("svft")[0].settings() == {"targets": None, "pattern": "banded", "band": 2,
                                                   "seed": 0}
