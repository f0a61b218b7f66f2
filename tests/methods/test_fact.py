"""FacT against its equation in plain float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import TargetError
from burnish.core.site import Place
from burnish.methods.delta.shared.fact import Tiles
from burnish.testing.models import tiny


class Block(nn.Module):
    """A width of 6: one square matrix, one of four tiles up, one of four tiles down."""

    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.q(x))))


def tuned_block(form, dropout=0.0):
    torch.manual_seed(0)
    net = Block().double()
    tuned = burnish.tune(net, f"fact(rank=3, form='{form}', scale=0.7, dropout={dropout})",
                         targets="q,up,down", head=False)
    for m in net.modules():
        if hasattr(m, "burnish"):
            m.burnish.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn_like(p))
    return net, tuned


def dense(term, U, V, C, d=6, s=0.7):
    """Delta[tile a, b] = s V Sigma_ab U^T, Sigma_ab given or sum_j P_abj C[:, :, j]."""
    rows = []
    for a in range(term["rows"]):
        row = []
        for b in range(term["columns"]):
            sigma = term["sigma"][a, b] if C is None else \
                sum(term["P"][a, b, j] * C[:, :, j] for j in range(3))
            row.append(s * V @ sigma @ U.t())
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_outputs_and_gradients_are_the_equations(form):
    net, tuned = tuned_block(form)
    shared = net.burnish.default["fact_shared"]
    ref = {n: p.detach().clone().requires_grad_() for n, p in shared.named_parameters()}
    own, layers = {}, {}
    for n in ("q", "up", "down"):
        term = getattr(net, n).burnish.default["fact"]
        own[n] = {k: p.detach().clone().requires_grad_() for k, p in term.named_parameters()}
        layers[n] = own[n] | {"rows": term.rows, "columns": term.columns}
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()

    def layer(n, x):
        lin = getattr(net, n)
        D = dense(layers[n], ref["U"], ref["V"], ref.get("C"))
        return x @ (lin.weight.detach() + D).t() + lin.bias.detach()

    y = net(x)
    want = layer("down", torch.tanh(layer("up", layer("q", x2))))
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-8, atol=1e-11)
    for n, p in shared.named_parameters():
        torch.testing.assert_close(p.grad, ref[n].grad, rtol=1e-8, atol=1e-11)
    for n in own:
        for k, p in getattr(net, n).burnish.default["fact"].named_parameters():
            torch.testing.assert_close(p.grad, own[n][k].grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 1), (1, 4), (3, 2), (2, 3)])
def test_as_two_factors_it_has_the_rank_of_its_shorter_side(form, rows, columns):
    """(A, B) with B A = Delta, of rank 3 for each tile along the side that has fewer."""
    net, _ = tuned_block(form)
    shared = net.burnish.default["fact_shared"]
    place = Place("l", "weight", "linear", 6 * rows, 6 * columns)
    term = Tiles(place, 6, 3, 0.7, 0.0, form == "tk", shared).double()
    own = {k: p.detach() for k, p in term.named_parameters()}
    want = dense(own | {"rows": rows, "columns": columns}, shared.U, shared.V,
                 shared.C if form == "tk" else None)
    A, B = term.low_rank()
    fewer = 3 * min(rows, columns)
    assert A.shape == (fewer, 6 * columns) and B.shape == (6 * rows, fewer)
    torch.testing.assert_close(B @ A, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form, want", [("tt", 61_440), ("tk", 86_528)])
def test_the_count_on_vit_b(form, want):
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        net = ViTForImageClassification(ViTConfig(num_labels=2))
    method = burnish.parse(f"fact(rank={16 if form == 'tt' else 32}, form='{form}')")[0]
    places = [Place(n, "weight", "linear", m.out_features, m.in_features)
              for n, m in net.named_modules()
              if isinstance(m, nn.Linear) and "classifier" not in n]
    assert len(places) == 72
    shared = method.shared(places)
    bag = type("Bag", (), shared)
    n = sum(t.numel() for t in shared.values()) + sum(method.count(p, bag) for p in places)
    assert n == want


def test_it_starts_as_the_base_and_v_moves_first():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "fact(rank=4)", head=False)
    assert torch.equal(net(**batch).logits, want)
    net(**batch).loss.backward()
    moved = {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.grad.any()}
    assert moved == {"V"}


def test_one_set_of_shared_tensors_in_the_model_and_in_the_file(tmp_path):
    from safetensors.torch import load_file

    net, batch = tiny("vit")
    tuned = burnish.tune(net, "fact(rank=4, form='tk')", head=False)
    for _ in range(3):
        tuned.step(batch)
    names = [n for n, _ in tuned.named_parameters()]
    assert sum(n.endswith((".U", ".V", ".C")) for n in names) == 3
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted(file) == sorted(names)
    other, _ = tiny("vit")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_dropout_acts_in_training_and_is_drawn_again_in_backward():
    net, tuned = tuned_block("tt", dropout=0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    net.eval()
    plain = net(x)
    assert torch.equal(net(x), plain)
    net.train()
    torch.manual_seed(1)
    y = net(x)
    assert not torch.allclose(y, plain)
    V = net.burnish.default["fact_shared"].V
    torch.manual_seed(7)                    # backward must not depend on where the generator is
    (g,) = torch.autograd.grad(y.sum(), [V])
    eps, total = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            V[2, 1] += sign * eps
            torch.manual_seed(1)
            total.append(float(net(x).sum()))
            V[2, 1] -= sign * eps
    assert (total[0] - total[1]) / (2 * eps) == pytest.approx(float(g[2, 1]), rel=1e-6)


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("name", ["q", "up", "down"])
def test_under_dropout_it_is_the_equation_with_what_was_drawn(form, name):
    """y = x W^T + b + s drop(Sigma U^T x) V^T, by one mask for all that a layer makes."""
    net, _ = tuned_block(form, dropout=0.5)
    lin, shared = getattr(net, name), net.burnish.default["fact_shared"]
    term = lin.burnish.default["fact"]
    x = torch.randn(7, lin.in_features, dtype=torch.float64)
    net.train()
    torch.manual_seed(1)
    got = lin(x)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(7, term.rows, 3, dtype=torch.float64), 0.5)
    params = [*shared.parameters(), *term.parameters()]
    at = dict(shared.named_parameters()) | dict(term.named_parameters())
    rows = []
    for a in range(term.rows):
        t = 0
        for b in range(term.columns):
            sigma = at["sigma"][a, b] if form == "tt" else \
                sum(at["P"][a, b, j] * at["C"][:, :, j] for j in range(3))
            t = t + x[:, 6 * b : 6 * b + 6] @ at["U"] @ sigma.t()
        rows.append(0.7 * (mask[:, a] * t) @ at["V"].t())
    want = F.linear(x, lin.weight, lin.bias) + torch.cat(rows, 1)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, params, g),
                          torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_matrix_that_is_no_whole_number_of_tiles_is_refused():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8))
    with pytest.raises(TargetError, match=r"6 x 6 tiles.*1.weight \(8 x 6\)"):
        burnish.tune(net, "fact(rank=2)", targets="0,1", head=False)


def test_checkpointing_gives_shared_tensors_their_gradients():
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("vit")
        tuned = burnish.tune(net, "fact(rank=4)" + extra, head=False)
        with torch.no_grad():
            for i, p in enumerate(tuned.parameters()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        net.eval()
        net(**batch).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    assert all(torch.allclose(grads[1][n], g) and g.any() for n, g in grads[0].items())


def test_defaults_are_the_published_ones():
    assert burnish.parse("fact")[0].settings() == {
        "targets": None, "rank": 16, "form": "tt", "scale": 1.0, "dropout": 0.0}


def test_what_a_token_keeps_besides_the_input():
    place = Place("l", "weight", "linear", 24, 16)
    assert burnish.parse("fact(rank=3)")[0].per_token(place) == 0


def uniform(t, bound):
    """Values as even as they would be from +-bound: range, and second and fourth moments."""
    t = t.detach().double() / bound
    assert t.abs().max() <= 1 and t.min() < -0.95 and t.max() > 0.95
    assert float(t.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(t.square().mean()) == pytest.approx(1 / 3, rel=0.1)


def test_the_start_is_drawn_at_the_published_spread():
    """U and Sigma in +-1/sqrt(their columns), P of variance 1/rank, C by Glorot's rule; V = 0."""
    for form in ("tt", "tk"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(96, 96))
        burnish.tune(net, f"fact(rank=64, form='{form}')", targets="0", head=False)
        wide = nn.Sequential(*(nn.Linear(96, 96) for _ in range(24)))
        burnish.tune(wide, f"fact(rank=64, form='{form}')", targets="*", head=False)
        shared = wide.burnish.default["fact_shared"]
        assert not shared.V.any()
        uniform(shared.U, 96**-0.5)
        if form == "tt":
            uniform(net[0].burnish.default["fact"].sigma, 64**-0.5)
        else:
            uniform(torch.cat([m.burnish.default["fact"].P.flatten() for m in wide]),
                    (3 / 64) ** 0.5)
            uniform(shared.C, (6 / (64 * 64 + 64 * 64)) ** 0.5)


def test_dropout_is_a_probability():
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match="fact: dropout"):
            burnish.parse(f"fact(dropout={p})")
    assert burnish.parse("fact(dropout=0.0)") and burnish.parse("fact(dropout=0.9)")


def test_more_columns_than_a_tile_has_are_refused():
    with pytest.raises(burnish.RecipeError, match="rank 7 does not fit"):
        burnish.tune(Block(), "fact(rank=7)", targets="q,up,down", head=False)
    with pytest.raises(burnish.RecipeError, match="rank 7 does not fit"):
        burnish.tune(Block(), "fact(rank=7)", targets="q", head=False)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 6))
    with pytest.raises(burnish.RecipeError, match="rank 3 does not fit 1.weight .2 x 6"):
        burnish.tune(net, "fact(rank=3)", targets="0,1,2", head=False)
    tuned = burnish.tune(net, "fact(rank=3)", head=False)        # nobody has named the small ones
    assert [n for n, _ in tuned.terms(Tiles)] == ["0.weight", "3.weight"]
    assert net.burnish.default["fact_shared"].U.shape == (6, 3)
