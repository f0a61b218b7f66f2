"""GLoRA: a scale and a shift of every entry, against its equation in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.delta.ofw.glora import Generalised
from burnish.testing import follows
from burnish.testing.models import tiny


def made(settings, size=(9, 12)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size)).double()
    tuned = burnish.tune(model, f"glora({settings})", head=False, targets="*")
    (_, term), = tuned.terms(Generalised)
    return model, tuned, term.double()


@pytest.mark.parametrize("form, names", [
    ("lora", ["A_in", "A_out", "B_in", "B_out"]), ("vector", ["A", "B"]),
    ("constant", ["A", "B"])])
def test_outputs_and_gradients_are_those_of_the_equation(form, names):
    model, tuned, term = made(f"rank=3, form='{form}'")
    W, bias = (t.detach().clone() for t in (model[0].weight, model[0].bias))
    assert [n for n, _ in term.named_parameters()] == names
    for p in term.parameters():
        p.data.normal_()

    def equation(x, *theta):
        A, B = (theta[1] @ theta[0], theta[3] @ theta[2]) if form == "lora" else theta
        y = torch.zeros(*x.shape[:-1], 12, dtype=x.dtype) + bias
        for i in range(9):
            for o in range(12):
                a, b = (M[0] if form == "constant" else M[o, 0] if form == "vector" else M[o, i]
                        for M in (A, B))
                y = y + F.one_hot(torch.tensor(o), 12) * x[..., i, None] * (W[o, i] * (1 + a) + b)
        return y

    follows(tuned, equation, list(term.parameters()), (4, 3, 9))


def test_the_start():
    """The base bit for bit; the factors that read the input are uniform."""
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    for form in ("lora", "vector", "constant"):
        tuned = burnish.tune(net, f"glora(form='{form}')", head=False)
        assert torch.equal(net(**batch).logits, want)
        tuned.detach()
    _, _, term = made("rank=8", (64, 400))
    for name in ("A_in", "B_in"):
        t = getattr(term, name).detach()
        assert float(t.abs().max()) <= 1 / 8 and float(t.std()) == pytest.approx(
            1 / 8 / 3**0.5, rel=0.1)
    assert not term.A_out.any() and not term.B_out.any()
    assert not torch.equal(term.A_in, term.B_in)


def test_counts_and_defaults():
    m = parse("glora")[0]
    assert (m.rank, m.form) == (8, "lora")
    place = Place("q", "weight", "linear", 768, 512)
    assert m.count(place) == 2 * 8 * (768 + 512) and m.per_token(place) == 0
    assert parse("glora(form='vector')")[0].count(place) == 2 * 768
    assert parse("glora(form='constant')")[0].count(place) == 2


def test_a_rank_above_the_matrix_is_refused_where_it_counts():
    net = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(RankError, match="the largest rank there is 4"):
        burnish.tune(net, "glora(rank=5)", head=False, targets="*")
    burnish.tune(net, "glora(rank=5, form='vector')", head=False, targets="*")


def test_one_function_of_w_on_a_matrix():
    assert parse("glora(targets='q')")[0].claims() == ("the function of W on q",)
    assert parse("glora")[0].claims() == ("the function of W on the default targets",)
    with pytest.raises(burnish.RecipeError, match="function of"):
        burnish.tune(tiny("vit")[0], "glora + hut")
