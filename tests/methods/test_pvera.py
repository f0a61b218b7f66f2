"""PVeRA: VeRA whose hidden numbers are drawn, against the equation with the noise in hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.methods.delta.shared.pvera import Sampled
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=5", sizes=((12, 9),)):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*s) for s in sizes)).double()
    tuned = burnish.tune(model, f"pvera({settings})", head=False, targets="*")
    terms = [t.double() for _, t in tuned.terms(Sampled)]
    terms[0].shared.double()
    stir(tuned)
    return model, tuned, terms


def update(x, noise, A, B, d, b):
    m, l2 = (d * (x @ A.t()))[..., :len(d) // 2], (d * (x @ A.t()))[..., len(d) // 2:]
    return b * ((m + noise * torch.exp(l2 / 2)) @ B.t())


def test_evaluated_it_is_vera_with_the_mean():
    model, tuned, (term,) = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    model.eval()
    A, B = term.shared.A[:, :12], term.shared.B[:9]
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    want = F.linear(x, W, bias) + update(x, 0.0, A, B, term.d, term.b)
    torch.testing.assert_close(model(x), want)
    R, L = term.low_rank()
    assert R.shape == (5, 12) and L.shape == (9, 5)
    model.train()
    torch.testing.assert_close(term.low_rank()[1] @ term.low_rank()[0], term.dense())
    torch.testing.assert_close(F.linear(x, W + term.dense(), bias), want)
    torch.testing.assert_close(tuned.merge()(x), want)


def test_outputs_and_gradients_in_training_are_the_equations_for_the_noise_that_was_drawn():
    model, tuned, (term,) = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    A, B = term.shared.A[:, :12], term.shared.B[:9]
    model.train()

    def equation(x, d, b):
        torch.manual_seed(3)
        noise = torch.randn(15, 5, dtype=torch.float64).view(5, 3, 5)
        return F.linear(x, W, bias) + update(x, noise, A, B, d, b)

    inner = tuned.model.forward
    model.forward = lambda x: (torch.manual_seed(3), inner(x))[1]
    follows(tuned, equation, [term.d, term.b], (5, 3, 12), merged=False)


def test_noise_has_the_size_that_the_second_half_says():
    model, _, (term,) = made("rank=2")
    with torch.no_grad():
        term.d.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
        term.shared.A.zero_()
        term.shared.A[2, 0], term.shared.A[3, 0] = 2.0, -2.0
        term.b.fill_(1.0)
        term.shared.B.zero_()
        term.shared.B[0, 0] = term.shared.B[1, 1] = 1.0
    model.train()
    x = torch.zeros(20000, 12, dtype=torch.float64)
    x[:, 0] = 1.0
    y = term.path(x @ term.into.t()).detach()
    assert float(y[:, 0].std()) == pytest.approx(2.718, rel=0.03)      # exp(2 / 2)
    assert float(y[:, 1].std()) == pytest.approx(0.368, rel=0.03)
    assert abs(float(y[:, 0].mean())) < 0.1 and not y[:, 2:].any()


def test_matrices_share_their_bases_and_a_file_holds_vectors_alone(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "pvera(rank=16)", seed=3)
    shared = net.burnish.default["pvera_shared"]
    assert shared.A.shape[0] == 32 and shared.B.shape[1] == 16
    assert sum(p.numel() for p in tuned.parameters()) == sum(
        32 + t.out for _, t in tuned.terms(Sampled))
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"d", "b"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_the_bases_of_a_folder_stand_in_our_files_too(bases_of_a_folder):
    """Of PEFT's folder they are its own: no seed makes them, so what we save has them."""
    shapes = bases_of_a_folder("pvera(rank=8)")
    assert shapes == {"A": (16, 48), "B": (48, 8)}         # the widest side of the model


def test_the_start():
    net, batch = tiny("vit")
    net.train()
    want = net(**batch).logits
    burnish.tune(net, "pvera(rank=8)")
    net.train()
    assert torch.equal(net(**batch).logits, want)         # b is zero, whatever is drawn
    torch.manual_seed(0)
    tuned = burnish.tune(nn.Sequential(nn.Linear(8, 6)), "pvera(rank=4, d_start=0.5)", head=False,
                         targets="0")
    (_, term), = tuned.terms(Sampled)
    assert torch.equal(term.d, torch.full((8,), 0.5)) and not term.b.any()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_defaults_counts_cost_and_refusals():
    (method,) = burnish.parse("pvera")
    assert method.settings() == {"targets": None, "rank": 256, "d_start": 0.1, "dropout": 0.0,
                                 "bases": "drawn"}
    place = Place("a", "weight", "linear", 9, 7)
    assert method.count(place) == 521 and method.per_token(place) == 512
    assert keeps_what_it_says("pvera", "vit") is None
    for settings, words in (("rank=0", "rank=0: expected"), ("dropout=1.0", "probability")):
        with pytest.raises(RecipeError, match=f"^pvera: .*{words}"):
            burnish.parse(f"pvera({settings})")
    assert burnish.parse("pvera(rank=1)")
    with pytest.raises(RecipeError, match=r"pvera\(bases='stored'\) has the bases of a saved"):
        burnish.tune(nn.Sequential(nn.Linear(4, 4)), "pvera(rank=2, bases='stored')", head=False,
                     targets="0")


def test_it_learns_under_its_noise():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4))
    tuned = burnish.tune(net, "pvera(rank=16)", head=False, targets="0")
    x, optimizer = torch.randn(256, 8), tuned.optimizer(lr=3e-2)
    want = net(x).detach() + x @ torch.randn(8, 4)
    net.eval()
    before = float((net(x) - want).square().mean())
    net.train()
    for _ in range(300):
        optimizer.zero_grad()
        (net(x) - want).square().mean().backward()
        optimizer.step()
    net.eval()
    assert float((net(x) - want).square().mean()) < 0.7 * before
