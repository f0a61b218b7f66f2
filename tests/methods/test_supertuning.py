"""Super-Tuning: the largest entries of a weight train, with or without a LoRA beside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.sparse.supertuning import Support
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings, inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"supertuning({settings})", head=False, targets="0")
    terms = [t for _, t in tuned.terms((Support, Chain))]
    for t in terms:
        t.double()
    return model, tuned, terms


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("lora, s", [("", 0), (", rank=2", 2.0), (", rank=2, alpha=3.0", 1.5)])
def test_outputs_and_gradients_are_those_of_the_equation(largest, lora, s):
    model, tuned, terms = made(f"density=0.2, largest={largest}{lora}")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    order = W.abs().flatten().argsort(descending=largest)[: int(0.2 * 108)].sort().values
    stir(tuned, size=0.3)

    def equation(x, v, *chain):
        delta = torch.zeros(108, dtype=torch.float64).index_put((order,), v).view(9, 12)
        if chain:
            A, B = chain
            delta = delta + s * B @ A
        return F.linear(x, W + delta, bias)

    follows(tuned, equation, [p for t in terms for p in t.parameters()], (5, 3, 12))
    assert len(terms) == (2 if lora else 1)


def test_the_start_and_the_file(tmp_path):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "supertuning(density=0.05, rank=2)")
    assert torch.equal(net(**batch).logits, want)
    net.train()
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"values", "index", "A", "B"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_dropout_acts_on_the_chain_alone():
    model, tuned, (support, chain) = made("density=0.2, rank=2, dropout=0.5")
    assert chain.dropout == 0.5 and not getattr(support, "dropout", 0)


def test_counts_and_cost():
    place = Place("a", "weight", "linear", 4096, 4096)
    (method,) = burnish.parse("supertuning")
    assert method.count(place) == 167_772 and method.per_token(place) == 0
    assert method.count(place, 5) == 5
    (supra,) = burnish.parse("supertuning(rank=8)")
    assert supra.count(place) == 167_772 + 8 * 8192 and supra.per_token(place) == 8
    assert keeps_what_it_says("supertuning", "vit") is None
    assert method.settings() == {"targets": None, "density": 0.01, "largest": True, "rank": None,
                                 "alpha": None, "dropout": 0.0}


@pytest.mark.parametrize("settings, words", [
    ("density=0", "density=0"), ("density=1.5", "density=1.5"), ("alpha=2.0", "of a LoRA"),
    ("dropout=0.1", "of a LoRA"), ("rank=2, dropout=1.0", "dropout=1.0"),
    ("rank=2, dropout=-0.5", "dropout=-0.5")])
def test_settings_that_are_none_are_refused(settings, words):
    with pytest.raises(burnish.RecipeError, match=f"^supertuning: .*{words}"):
        burnish.parse(f"supertuning({settings})")


def test_matrices_without_such_entries_are_refused():
    made("density=1")
    _, _, (support,) = made("density=0.01")
    assert support.counted == {"entries": 1}, "its file says how many"
    with pytest.raises(RankError, match="0 of the 108 entries of 0.weight"):
        made("density=0.001")
    with pytest.raises(RankError, match="supertuning: rank 10"):
        made("density=0.1, rank=10")
    with pytest.raises(RankError, match="109 of the 108"):
        burnish.parse("supertuning")[0].count(Place("0", "weight", "linear", 9, 12), 109)
