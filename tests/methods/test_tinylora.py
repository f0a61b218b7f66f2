"""TinyLoRA: a few numbers steer the principal directions, against the sums written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.between import Steered
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.methods.delta.shared.tinylora import group
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3, dimension=5", sizes=((12, 9),)):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*s) for s in sizes)).double()
    tuned = burnish.tune(model, f"tinylora({settings})", head=False, targets="*")
    terms = [t.double() for _, t in tuned.terms(Steered)]
    terms[0].shared.double()
    return model, tuned, terms


def factors(W, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vt[:r]


def update(L, R, P, v):
    return L @ sum(x * M for x, M in zip(v, P, strict=True)) @ R


def moved(shared):
    for v in shared.parameters():
        v.data.normal_()


def drawn(u, r, seed):
    return torch.randn(u, r, r, generator=torch.Generator().manual_seed(seed)) / r**0.5


@pytest.mark.parametrize("rank", [1, 3, 9, 40])
def test_outputs_and_gradients_are_those_of_the_sum(rank):
    model, tuned, (term,) = made(f"rank={rank}, dimension=5, seed=11")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    r = min(rank, 9)
    P = drawn(5, r, 11).double()
    torch.testing.assert_close(term.P, P, rtol=1e-5, atol=1e-6)
    L, R = factors(W, r)                         # kept in single precision
    torch.testing.assert_close(term.L, L, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(term.R, R, rtol=1e-5, atol=1e-6)
    term.L, term.R = L, R
    moved(term.shared)
    follows(tuned, lambda x, v: F.linear(x, W + update(L, R, term.P, v), bias), [term.shared.v0],
            (5, 3, 12))


def test_matrices_of_a_group_share_their_numbers_and_have_their_own_p():
    sizes = ((8, 8),) * 5
    model, tuned, terms = made("rank=2, dimension=4, tying=0.5", sizes)
    assert [t.name for t in terms] == ["v0", "v0", "v1", "v1", "v1"]
    assert len(list(tuned.parameters())) == 2
    for n, t in enumerate(terms):
        torch.testing.assert_close(t.P, drawn(4, 2, 42 + n).double(), rtol=1e-5, atol=1e-6)
    fixed = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model]

    def equation(x, v0, v1):
        for n, (W, bias) in enumerate(fixed):
            x = F.linear(x, W + update(terms[n].L, terms[n].R, terms[n].P,
                                       (v0, v0, v1, v1, v1)[n]), bias)
        return x

    shared = terms[0].shared
    moved(shared)
    follows(tuned, equation, [shared.v0, shared.v1], (5, 8))


@pytest.mark.parametrize("of, tying, groups", [
    (4, 0.0, [0, 1, 2, 3]), (4, 1.0, [0] * 4), (4, 0.5, [0, 0, 1, 1]), (1, 1.0, [0]),
    (6, 0.4, [0, 1, 2, 3, 3, 3]), (7, 0.6, [0, 0, 1, 1, 2, 2, 2]), (3, 0.9, [0] * 3)])
def test_groups_are_runs_of_one_length(of, tying, groups):
    assert [group(n, of, tying) for n in range(of)] == groups


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "tinylora(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    _, tuned, (term,) = made("dimension=2000, start=0.5")
    v = term.shared.v0.detach()
    assert 0.49 < float(v.max()) <= 0.5 and -0.5 <= float(v.min()) < -0.49
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_rows_of_a_table_are_looked_up_in_the_narrow_factor():
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(20, 6, padding_idx=4)).double()
    W = table[0].weight.detach().clone()
    tuned = burnish.tune(table, "tinylora(rank=2, dimension=3)", head=False, targets="0")
    (_, term), = tuned.terms(Steered)
    term.double(), term.shared.double()
    moved(term.shared)
    index = torch.tensor([[3, 4, 3], [19, 0, 4]])
    want = F.embedding(index, W + update(term.L, term.R, term.P, term.shared.v0).t(), 4)
    torch.testing.assert_close(table(index), want)
    g = torch.randn_like(want)
    got, = torch.autograd.grad(table(index), term.shared.v0, g)
    still = torch.where((index == 4)[..., None], 0.0, g)
    torch.testing.assert_close(got, torch.autograd.grad(want, term.shared.v0, still)[0])


def test_a_file_holds_what_no_two_machines_make_alike(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "tinylora(rank=2, dimension=6, tying=1.0)")
    for _ in range(2):
        tuned.step(batch)
    assert [p.numel() for p in tuned.parameters()] == [6]
    tuned.save(tmp_path / "a")
    names = [k.rpartition(".")[2] for k in load_file(tmp_path / "a/adapter_model.safetensors")]
    assert names.count("v0") == 1 and set(names) == {"v0", "L", "R", "P"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_defaults_counts_and_cost():
    (method,) = burnish.parse("tinylora")
    assert method.settings() == {"targets": None, "rank": 2, "dimension": 64, "tying": 0.0,
                                 "dropout": 0.0, "start": 0.0, "seed": 42}
    place = Place("a", "weight", "linear", 9, 7)
    assert method.count(place) == 0 and method.per_token(place) == 2
    for shape in ((9, 1), (1, 9)):
        assert method.per_token(Place("a", "weight", "linear", *shape)) == 1
    assert keeps_what_it_says("tinylora", "vit") is None
    assert burnish.parse("tinylora(rank=1, dimension=1, tying=1.0)")


@pytest.mark.parametrize("settings, words", [
    ("rank=0", "rank and dimension of at least 1"), ("dimension=0", "rank and dimension of at"),
    ("tying=1.1", "tying=1.1: expected a share"), ("tying=-0.1", "tying=-0.1: expected a share"),
    ("start=-0.1", "start=-0.1: expected a bound"), ("dropout=1.0", "probability")])
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(RecipeError, match=f"^tinylora: .*{words}"):
        burnish.parse(f"tinylora({settings})")
