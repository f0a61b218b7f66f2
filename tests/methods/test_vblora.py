"""VB-LoRA: pieces of factors mixed out of a bank, against the mixtures written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.banked import Banked
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def piece(logits, bank, k):
    """One mixture: a softmax over all logits but those below the k-th."""
    kept = torch.where(logits >= logits.sort().values[-k], logits, -torch.inf)
    return torch.softmax(kept, 0) @ bank


def update(a, b, bank, k):
    A = torch.stack([torch.cat([piece(one, bank, k) for one in row]) for row in a])
    B = torch.cat([torch.stack([piece(one, bank, k) for one in row], 1) for row in b])
    return B @ A


def made(settings="rank=3, vectors=7, span=4", inp=12, out=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"vblora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Banked)
    term.double(), term.shared.double()
    return model, tuned, term


@pytest.mark.parametrize("k", [2, 3, 7])
def test_outputs_and_gradients_are_those_of_the_mixtures(k):
    model, tuned, term = made(f"rank=3, vectors=7, span=4, k={k}, std=1.0, start=1.0")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    follows(tuned, lambda x, a, b, bank: F.linear(x, W + update(a, b, bank, k), bias),
            [term.a, term.b, term.shared.bank], (5, 3, 12))


def test_one_vector_a_piece_is_a_choice_that_stays():
    model, _, term = made("rank=3, vectors=7, span=4, k=1, std=1.0, start=1.0")
    torch.testing.assert_close(term.dense(), update(term.a, term.b, term.shared.bank, 1))
    model(torch.randn(5, 12).double()).square().sum().backward()
    assert not term.a.grad.any() and not term.b.grad.any() and term.shared.bank.grad.any()


def test_matrices_read_one_bank():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    tuned = burnish.tune(net, "vblora(rank=2, vectors=5, span=4)", head=False, targets="*")
    one, two = (t.double() for _, t in tuned.terms(Banked))
    one.shared.double()
    assert one.shared.bank is two.shared.bank and not torch.equal(one.a, two.a)
    assert sum(p.numel() for p in tuned.parameters()) == 5 * 4 + 2 * (2 * 2 * 5 + 2 * 2 * 5)
    x, ends = torch.randn(3, 8).double(), [m.weight.detach().clone() for m in net]
    with torch.no_grad():
        one.shared.bank.normal_()
    want = x
    for w, layer, t in zip(ends, net, (one, two), strict=True):
        want = F.linear(want, w + update(t.a, t.b, t.shared.bank, 2), layer.bias)
    torch.testing.assert_close(net(x), want)
    (mine,) = torch.autograd.grad(net(x).square().sum(), one.shared.bank)
    torch.testing.assert_close(mine, torch.autograd.grad(want.square().sum(), one.shared.bank)[0])


def test_what_is_not_among_the_best_has_no_gradient():
    model, _, term = made("rank=2, vectors=6, span=4, std=1.0")
    model(torch.randn(5, 12).double()).square().sum().backward()
    for logits in (term.a, term.b):
        asked = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(2).indices, True)
        assert not logits.grad[~asked].any() and bool(logits.grad[asked].all())


def test_the_start():
    _, tuned, term = made("rank=8, vectors=200, span=8", 64, 64)
    bank, logits = term.shared.bank.detach(), term.a.detach()
    assert 0.0195 < float(bank.max()) <= 0.02 and -0.02 <= float(bank.min()) < -0.0195
    assert float(logits.std()) == pytest.approx(0.1, rel=0.03) and abs(float(logits.mean())) < 0.01
    assert float(term.b.detach().std()) == pytest.approx(0.1, rel=0.03)
    groups = {g["lr"]: len(g["params"]) for g in tuned.optimizer(
        lr=1e-3, weight_decay=0.5).param_groups}
    assert groups == {1e-2: 2, 1e-3: 1}
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_a_file_holds_the_bank_once(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "vblora(rank=2, vectors=9, span=8)")
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    names = [k.rpartition(".")[2] for k in load_file(tmp_path / "a/adapter_model.safetensors")]
    assert names.count("bank") == 1 and set(names) == {"a", "b", "bank"}
    torch.manual_seed(9)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_counts_and_cost():
    (method,) = burnish.parse("vblora(vectors=90)")
    # RoBERTa-large, q and v: the logits; what is kept of them is 2 indices and a weight a piece
    place = Place("a", "weight", "linear", 1024, 1024)
    assert method.count(place) == 90 * 4 * 8 and method.per_token(place) == 4
    assert burnish.parse("vblora")[0].settings() == {
        "targets": None, "rank": 4, "vectors": 256, "span": 256, "k": 2, "dropout": 0.0,
        "start": 0.02, "std": 0.1, "gate_rate": 10.0}
    assert keeps_what_it_says("vblora", "vit") is None


@pytest.mark.parametrize("recipe, shape, words", [
    ("vblora(k=0)", (8, 8), "k=0: expected from 1 to vectors=256"),
    ("vblora(k=8, vectors=7)", (8, 8), "k=8: expected from 1 to vectors=7"),
    ("vblora(rank=0)", (8, 8), "rank and span of at least 1"),
    ("vblora(span=0)", (8, 8), "rank and span of at least 1"),
    ("vblora(start=0.0)", (8, 8), "start > 0 and std >= 0"),
    ("vblora(std=-0.1)", (8, 8), "start > 0 and std >= 0"),
    ("vblora(span=8)", (8, 12), r"span=8 does not divide 0.weight \(12 x 8\); 2, 4 would"),
    ("vblora(span=8)", (12, 8), r"span=8 does not divide 0.weight \(8 x 12\); 2, 4 would"),
    ("vblora(span=5)", (7, 9), "none would"), ("vblora(dropout=1.0)", (8, 8), "probability"),
    ("vblora(gate_rate=0.0)", (8, 8), "gate_rate multiplies a learning rate"),
    ("vblora(span=5)", (768, 256), "; 2, 4, 8, 16, 32, 64, 128, 256 would")])
def test_what_cannot_be_is_refused(recipe, shape, words):
    with pytest.raises(RecipeError, match=f"^vblora: .*{words}"):
        burnish.tune(nn.Sequential(nn.Linear(*shape)), recipe, head=False, targets="0")


def test_what_just_can_be():
    for settings in ("k=5, vectors=5", "std=0.0", "k=1, vectors=1", "rank=1", "rank=8"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), f"vblora(span=1, {settings})", head=False,
                     targets="0")
    with pytest.raises(RankError, match="^vblora: rank 9"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "vblora(span=1, rank=9)", head=False,
                     targets="0")
