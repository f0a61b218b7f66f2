"""FRoD: a full basis for the weights of one kind, against its equations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.joint import Joint, basis, off_diagonal, within
from burnish.core import unread
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.delta.shared.frod import kind_of, kinds_of
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="density=0.2", sizes=((6, 6), (6, 6), (6, 6))):
    """Matrices of one kind, "0", in blocks of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(*s)) for s in sizes)).double()
    tuned = burnish.tune(model, f"frod({settings})", head=False, targets="*")
    terms = [t.double() for _, t in tuned.terms(Joint)]
    terms[0].shared.double()
    return model, tuned, terms


def exact(model, terms):
    """The frozen parts in double, where they were kept in single precision."""
    for block, t in zip(model, terms, strict=True):
        B = torch.linalg.solve(t.V, block[0].weight.detach().t()).t()
        t.z0 = B.norm(dim=0)
        t.L = B / t.z0


def update(t, z, values, index):
    n = len(z)
    S = torch.zeros(n, n, dtype=z.dtype)
    for k, flat in enumerate(index.tolist()):
        S = S + values[k] * torch.eye(n, dtype=z.dtype)[flat // n][:, None] \
            * torch.eye(n, dtype=z.dtype)[flat % n]
    return t.L @ (torch.diag(z) + S) @ t.V.t()


def test_outputs_and_gradients_are_those_of_the_product():
    """W' = U (diag(z) + S) V^T, which is W' alone and not W plus something."""
    model, tuned, terms = made()
    exact(model, terms)
    g = torch.Generator().manual_seed(1)
    for t in terms:
        t.z.data = t.z0 + torch.randn(6, generator=g, dtype=torch.float64)
        t.values.data.normal_(generator=g)
    biases = [b[0].bias.detach().clone() for b in model]
    index = terms[0].shared.index_0

    def equation(x, *theta):
        for k, t in enumerate(terms):
            x = F.linear(x, update(t, theta[2 * k], theta[2 * k + 1], index), biases[k])
        return x

    follows(tuned, equation, [p for t in terms for p in (t.z, t.values)], (5, 6))


@pytest.mark.parametrize("sizes", [[(6, 6)] * 3, [(6, 4), (6, 9)], [(6, 7)], [(6, 2), (6, 3)]])
def test_every_weight_is_its_product(sizes):
    torch.manual_seed(1)
    weights = [torch.randn(o, i) for i, o in sizes]
    V = basis(weights, 1e-3)
    assert V.shape == (6, 6)
    for W in weights:
        U, size = within(V, W)
        torch.testing.assert_close(U @ torch.diag(size) @ V.t().double(), W.double(), rtol=1e-5,
                                   atol=1e-5)
        torch.testing.assert_close(U.norm(dim=0)[size > 1e-6],
                                   torch.ones(6, dtype=torch.float64)[size > 1e-6])


@pytest.mark.parametrize("ridge", [1e-3, 2.0])
def test_the_basis_by_the_gram_of_all(ridge):
    """R by Cholesky: V = R^T E with E^T E = 1, and E turns the mean inverse into values that
    rise."""
    torch.manual_seed(2)
    weights = [torch.randn(o, 6, dtype=torch.float64) for o in (6, 9, 4)]
    V = basis(weights, ridge)
    R = torch.linalg.cholesky(sum(W.t() @ W for W in weights)).t()
    E = torch.linalg.solve(R.t(), V)
    torch.testing.assert_close(E.t() @ E, torch.eye(6, dtype=torch.float64))
    inverse = torch.linalg.inv(R)
    T = sum(torch.linalg.inv(inverse.t() @ W.t() @ W @ inverse
                             + ridge * torch.eye(6, dtype=torch.float64)) for W in weights) / 3
    values = E.t() @ T @ E
    torch.testing.assert_close(values, torch.diag(values.diag()), atol=1e-9, rtol=0)
    assert (values.diag().diff() > 0).all()


def test_few_rows_have_their_singular_vectors():
    torch.manual_seed(3)
    weights = [torch.randn(2, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)]
    V = basis(weights, 1e-3)
    torch.testing.assert_close(V.t() @ V, torch.eye(6, dtype=torch.float64))
    G = V.t() @ sum(W.t() @ W for W in weights) @ V
    torch.testing.assert_close(G, torch.diag(G.diag()), atol=1e-12, rtol=0)
    assert (G.diag().diff()[:2] < 0).all() and (G.diag()[3:].abs() < 1e-12).all()


def test_a_direction_that_a_weight_has_nothing_of():
    V = torch.eye(3, dtype=torch.float64)
    U, size = within(V, torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1e-13]]))
    assert U.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert size.tolist() == pytest.approx([2, 0, 1e-13])


def test_a_kind_shares_its_basis_and_its_places():
    net = tiny("llama")[0]
    tuned = burnish.tune(net, "frod(density=0.1, targets='q,down')")
    terms = dict(tuned.terms(Joint))
    assert {t.name for t in terms.values()} == {"self_attn_q_proj", "mlp_down_proj"}
    assert len({id(t.shared) for t in terms.values()}) == 1
    weights = [layer.self_attn.q_proj.weight.detach() for layer in net.model.layers]
    q = [t for n, t in terms.items() if "q_proj" in n]
    torch.testing.assert_close(q[0].V, basis(weights, 1e-3))
    for t, W in zip(q, weights, strict=True):
        U, size = within(q[0].V, W)
        torch.testing.assert_close(t.L, U.float())
        torch.testing.assert_close(t.z, size.float())
        assert torch.equal(t.z, t.z0) and not t.values.any()


@pytest.mark.parametrize("path, kind", [
    ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"), ("layers.0", "layers_0"), ("h", "h"),
    ("blocks.0.qkv", "qkv"), ("encoder.layer.0.attention.output.dense", "attention_output"),
    ("bert.encoder.layer.0.attention.output.dense", "attention_output"),
    ("encoder.layer.0.output.dense", "output_dense"), ("1.0", "0"), ("a.b", "a_b")])
def test_what_a_matrix_is_called(path, kind):
    assert kind_of(path) == kind


def test_slices_and_other_widths_are_kinds_of_their_own():
    def at(path, inp, rows=None, role=""):
        return Place(path, "weight", "linear", 8, inp, role=role, rows=rows)

    places = [at("h.0.a", 4), at("h.1.a", 4), at("h.2.a", 6), at("h.0.qkv", 4, (0, 8), "q"),
              at("h.0.qkv", 4, (8, 16), "v"), at("h.0.qkv", 4)]
    assert list(kinds_of(places).values()) == ["a", "a", "a_6", "qkv_q", "qkv_v", "qkv"]


@pytest.mark.parametrize("n, density, want", [(6, 0.2, 7), (6, 1.0, 30), (6, 1e-9, 1), (1, 0.5, 0),
                                              (10, 0.5, 50)])
def test_places_beside_the_diagonal(n, density, want):
    at = off_diagonal(n, density, torch.Generator().manual_seed(0))
    assert len(at) == len(set(at.tolist())) == want
    assert all(0 <= i < n * n and i // n != i % n for i in at.tolist())
    other = off_diagonal(n, density, torch.Generator().manual_seed(1))
    assert want in (0, 1, 30) or not torch.equal(at, other)


def test_the_seed_draws_the_places_and_the_ridge_is_in_the_basis():
    _, _, (a, *_) = made()
    _, _, (b, *_) = made("density=0.2, seed=1")
    _, _, (c, *_) = made("density=0.2, ridge=5.0")
    assert not torch.equal(a.shared.index_0, b.shared.index_0)
    assert torch.equal(a.shared.index_0, c.shared.index_0)
    assert torch.equal(a.V, b.V) and not torch.allclose(a.V, c.V, atol=1e-3)


def test_the_start_is_the_base_and_nothing_decays():
    net, batch = tiny("gpt2")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "frod")
    assert torch.equal(net(**batch).logits, want)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_counts_and_defaults():
    m = parse("frod")[0]
    assert (m.density, m.ridge, m.dropout, m.seed) == (0.01, 1e-3, 0.0, 0)
    place = Place("q", "weight", "linear", 4096, 4096)
    assert m.count(place) == 4096 + int(4096 * 4096 * 0.01)
    assert m.per_token(place) == 4096
    assert m.repeats() is None
    assert keeps_what_it_says("frod", "vit") is None


@pytest.mark.parametrize("settings, why", [
    ("density=0", "a share above 0"), ("density=1.5", "a share above 0"),
    ("ridge=0", "a number above 0"), ("dropout=1.5", "dropout")])
def test_what_it_refuses(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"frod({settings})")


def test_weights_that_wait_in_their_files_give_the_basis_of_those_that_are_read(tmp_path,
                                                                                 monkeypatch):
    """All of a kind are in the basis, each of them there only while it is looked at."""
    monkeypatch.setattr(unread, "WAITS", 1)
    net = tiny("llama")[0]
    net.save_pretrained(tmp_path)
    whole = burnish.tune(net, "frod(density=0.1)")
    waited = burnish.tune(burnish.open_model(tmp_path), "frod(density=0.1)")
    for (n, a), (m, b) in zip(whole.terms(Joint), waited.terms(Joint), strict=True):
        assert n == m and bool(a.V.any())
        for x, y in ((a.V, b.V), (a.L, b.L), (a.z, b.z)):
            assert torch.equal(x, y), n


def test_a_weight_that_is_not_finite():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight.data[1, 2] = float("nan")
    with pytest.raises(CheckError, match="frod: .* 0"):
        burnish.tune(net, "frod", head=False, targets="*")
