"""SAID: updates inside a random subspace, the projection written out as a matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight import projected
from burnish.blocks.weight.projected import Projected
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

FORMS = ("fastfood", "dense", "sparse")


def made(settings, shapes=((12, 9), (9, 7)), **kw):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in shapes)).double()
    tuned = burnish.tune(model, f"said({settings})", head=False, targets="all", **kw)
    for m in model.modules():
        if hasattr(m, "burnish"):
            m.burnish.double()
    return model, tuned, [t for _, t in tuned.terms(Projected)]


@torch.no_grad()
def matrix(term, d):
    """P_i as (entries, d), by unit vectors; entries as in the (out, in) matrix, row by row."""
    z, was = term.shared.z, term.shared.z.clone()
    columns = []
    for j in range(d):
        z.zero_()[j] = 1.0
        columns.append(term.dense().flatten() / (term.lam if hasattr(term, "lam") else 1.0))
    z.copy_(was)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [True, False])
def test_outputs_and_gradients_are_those_of_the_projection(form, scaled):
    model, tuned, terms = made(f"dimension=5, projection={form!r}, scaled={scaled}")
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    P = [matrix(t, 5) for t in terms]
    layers = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model]
    z = model.burnish.default["said_shared"].z

    def equation(x, z, *lam):
        for k, ((W, b), Pi) in enumerate(zip(layers, P, strict=True)):
            change = (Pi @ z).view(W.shape)
            x = F.linear(x, W + (lam[k] * change if scaled else change), b)
        return x

    follows(tuned, equation, [z, *(t.lam for t in terms if scaled)], (4, 3, 12))


def hadamard(n):
    """H by its recursion."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def test_fastfood_is_its_five_matrices():
    """S H G Pi H B, S = 1 / sqrt(l sum G^2), with unit columns over all D: sqrt(n / D)."""
    model, _, terms = made("dimension=11")
    D = 12 * 9 + 9 * 7
    for term in terms:
        n, H = 16, hadamard(16)
        Pi = torch.eye(n, dtype=torch.float64)[term.order]
        B = torch.diag(term.signs)
        G = torch.randn(term.chunk // n, n, generator=term._generator(0)).double()
        blocks = [H @ torch.diag(g) @ Pi @ H @ B / (n * g.square().sum()).sqrt() for g in G]
        whole = torch.cat(blocks)[: term.out * term.inp, :11] * (n / D) ** 0.5
        want = whole.view(term.inp, term.out, 11).transpose(0, 1).reshape(-1, 11)
        torch.testing.assert_close(matrix(term, 11), want, rtol=1e-6, atol=1e-8)
        assert set(term.signs.tolist()) == {-1.0, 1.0}
        assert sorted(term.order.tolist()) == list(range(16))
        assert term.chunk == 16 * -(-term.out * term.inp // 16)


@pytest.mark.parametrize("form, off", [("fastfood", 0.05), ("dense", 0.05), ("sparse", 0.05)])
def test_columns_have_unit_length_and_are_nearly_orthogonal(form, off):
    model, _, terms = made(f"dimension=20, projection={form!r}", shapes=((160, 120), (120, 160)))
    P = torch.cat([matrix(t, 20) for t in terms])
    gram = P.t() @ P
    assert float((gram.diagonal() - 1).abs().max()) < off
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 0.05
    if form == "sparse":
        D = 2 * 160 * 120
        filled = float((P != 0).double().mean())
        assert filled == pytest.approx(D**-0.5, rel=0.1)
        assert float(P.abs().max()) < 4 * D**-0.25         # some positions are drawn twice
        assert float(P.sum()) == pytest.approx(0.0, abs=5 * (20 * D**0.5) ** 0.5 * D**-0.25)


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_made_in_panels_and_chunks_is_the_same(form, monkeypatch):
    assert projected.DRAWN == 1 << 18                      # files depend on it
    monkeypatch.setattr(projected, "DRAWN", 64)
    model, tuned, (term, _) = made(f"dimension=7, projection={form!r}")
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    assert term.chunk == (9 if form == "dense" else 64)
    whole = term.dense()
    parts = torch.cat([term.tile(i, min(i + 5, 12), None) for i in range(0, 12, 5)], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert len(whole.detach().unique()) > 0.5 * whole.numel() or form == "sparse"
    chunks = whole.t().flatten()[:108].detach()
    assert not torch.allclose(chunks[:40], chunks[64:104])


def test_matrices_have_projections_of_their_own_and_a_seed_another():
    P = [matrix(t, 6) for t in made("dimension=6", shapes=((8, 8), (8, 8)))[2]]
    assert not torch.allclose(P[0], P[1])
    again = [matrix(t, 6) for t in made("dimension=6", shapes=((8, 8), (8, 8)))[2]]
    other = matrix(made("dimension=6, seed=1", shapes=((8, 8), (8, 8)))[2][0], 6)
    assert torch.equal(P[0], again[0]) and not torch.allclose(P[0], other)


@pytest.mark.parametrize("form", FORMS)
def test_ten_constraints_have_an_intrinsic_dimension_of_ten(form):
    """1000 parameters, the sums of each hundred are to be 1 ... 10: ten numbers do, nine do not."""
    left = {}
    for d in (9, 10):
        _, _, (term,) = made(f"dimension={d}, projection={form!r}", shapes=((100, 10),))
        P = matrix(term, d).view(10, 100, d).sum(1)
        goal = torch.arange(1, 11, dtype=torch.float64) - term.dense().detach().sum(1)
        z = torch.linalg.lstsq(P, goal.unsqueeze(1), driver="gelsd").solution
        left[d] = float((P @ z - goal.unsqueeze(1)).norm())
    assert left[10] < 1e-8 < 0.01 < left[9]


def test_start_count_cost_and_defaults():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "said(dimension=30)", head=False)
    assert torch.equal(net(**batch).logits, want)
    terms = [t for _, t in tuned.terms(Projected)]
    assert sum(p.numel() for p in tuned.parameters()) == 30 + len(terms)
    assert all(t.lam.tolist() == [1.0] for t in terms)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
    plain = burnish.tune(tiny("vit")[0], "said(dimension=30, scaled=False)", head=False)
    assert sum(p.numel() for p in plain.parameters()) == 30
    place = Place("l", "weight", "linear", 24, 16)
    (method,) = parse("said")
    assert method.count(place) == 1 and parse("said(scaled=False)")[0].count(place) == 0
    assert method.per_token(place) == 0 and keeps_what_it_says("said", "vit") is None
    assert method.settings() == {"targets": None, "dimension": 1000, "projection": "fastfood",
                                 "scaled": True, "seed": 0}


def test_the_entries_of_a_published_net():
    """MNIST, 784-200-200-10: 198,800 entries in matrices and 410 biases are its D of 199,210."""
    shapes = ((784, 200), (200, 200), (200, 10))
    _, tuned, terms = made("dimension=750", shapes=shapes)
    assert terms[0].total == 199_210 - 410
    assert sum(p.numel() for p in tuned.parameters()) == 750 + 3


def test_the_entries_of_a_published_convolutional_net():
    """LeNet on MNIST: 44,190 entries in kernels and matrices and 236 biases are its D of 44,426."""
    model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(256, 120),
                          nn.Linear(120, 84), nn.Linear(84, 10))
    tuned = burnish.tune(model, "said(dimension=290)", head=False, targets="all")
    terms = [t for _, t in tuned.terms(Projected)]
    assert len(terms) == 5 and terms[0].total == 44_426 - 236
    assert sum(p.numel() for p in tuned.parameters()) == 290 + 5


def test_files_hold_the_numbers_alone_and_a_load_draws_the_same_projection(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "said(dimension=30)", head=False)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"z", "lam"}
    torch.manual_seed(99)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_refusals():
    with pytest.raises(burnish.RecipeError, match="^said: dimension=0"):
        parse("said(dimension=0)")
    assert parse("said(dimension=1)")
    with pytest.raises(burnish.RecipeError, match="dimension=172 is more than the 171 entries"):
        made("dimension=172")
    _, _, terms = made("dimension=171")
    assert terms[0].length == 256 and made("dimension=1")[2][0].length == 1
    assert made("dimension=64")[2][0].length == 64


def test_the_projection_depends_on_its_seed_alone():
    """Not on the generator of the process: a file's numbers mean the same anywhere."""
    for form in FORMS:
        found = []
        for state in (1, 2):
            torch.manual_seed(state)
            term = alone(form, 5, 6, 7)
            found.append(matrix(term, 5))
        assert torch.equal(*found), form


def alone(form, d, out, inp, total=None):
    place = Place("a", "weight", "linear", out, inp)
    shared = nn.Module()
    shared.z = nn.Parameter(torch.randn(d))
    return Projected(place, form, d, total or out * inp, False, 0, shared)


@pytest.mark.parametrize("form, d, out, inp, chunk", [
    ("fastfood", 16, 8, 8, 64), ("fastfood", 16, 13, 5, 80), ("fastfood", 2**18 + 1, 2, 3, 2**19),
    ("dense", 2**18 + 1, 2, 3, 1), ("dense", 2**16, 2, 3, 4), ("dense", 10, 2, 3, 6)])
def test_what_is_drawn_at_once(form, d, out, inp, chunk):
    """What a file's numbers mean depends on it."""
    assert alone(form, d, out, inp).chunk == chunk


def test_the_columns_of_a_sparse_projection_begin_anywhere():
    term = alone("sparse", 16, 4, 4, total=10**9)
    used = set()
    for c in range(200):
        made = torch.autograd.grad(term.entries_of(c, term.shared.z, None).abs().sum(),
                                   term.shared.z)[0]
        assert int(made.count_nonzero()) <= 1, "one entry a chunk at the least, not two"
        used |= set(made.nonzero().flatten().tolist())
    assert len(used) > 12
