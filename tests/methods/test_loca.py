"""LoCA: entries of a cosine transform whose places train, against transforms written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import panels
from burnish.blocks.weight.located import Located, _back
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def dct(n):
    """Orthonormal DCT-II: row k is a cosine of k half turns."""
    k, o = torch.arange(n).double(), torch.arange(n).double()
    C = torch.cos(math.pi * (2 * o + 1) * k[:, None] / (2 * n)) * math.sqrt(2 / n)
    C[0] = math.sqrt(1 / n)
    return C


def update(alpha, out, inp, a, at):
    S = torch.zeros(out, inp, dtype=torch.float64)
    u, v = at.long()
    S = S.index_put((u, v), a, accumulate=True)
    return alpha * dct(out).t() @ S @ dct(inp)


def made(inp, out, settings="n=9, alpha=2.0"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"loca({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Located)
    term.double()
    with torch.no_grad():
        term.a.normal_()
    return tuned, term


@pytest.mark.parametrize("inp, out", [(12, 10), (7, 15), (1, 9)])
def test_outputs_and_gradients_are_those_of_the_equation(inp, out, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 40)
    tuned, term = made(inp, out)
    W, bias = (p.detach().clone() for p in (tuned.model[0].weight, tuned.model[0].bias))
    at = term.at.detach().clone()
    term.at.requires_grad_(False)
    follows(tuned, lambda x, a: F.linear(x, W + update(2.0, out, inp, a, at), bias), [term.a],
            (5, 3, inp))


def test_the_transforms_are_orthonormal_cosines():
    for n in (1, 2, 7, 8):
        torch.testing.assert_close(dct(n) @ dct(n).t(), torch.eye(n, dtype=torch.float64))
        x = torch.randn(n, 3, dtype=torch.float64)
        torch.testing.assert_close(_back(x), dct(n).t() @ x)
    term = Located(8, 9, torch.arange(72), 1.0).double()
    for k in (0, 4, 8):
        torch.testing.assert_close(term._waves(torch.tensor([k]), 2, 6)[0], dct(9)[k, 2:6])


def test_the_gradient_of_a_coefficient_is_the_transform_of_the_gradient():
    tuned, term = made(12, 10)
    x, g = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    (got,) = torch.autograd.grad(tuned.model(x), term.a, g)
    T = dct(10) @ (g.t() @ x) @ dct(12).t()
    u, v = term.at.detach().long()
    torch.testing.assert_close(got, 2.0 * T[u, v])


def test_the_gradient_of_a_place_is_half_the_difference_of_the_loss_beside_it(monkeypatch):
    """Exactly, for a loss that is linear in W; at a border, the difference to the one neighbour."""
    monkeypatch.setattr(panels, "PANEL", 30)
    out, inp = 6, 7
    tuned, term = made(inp, out, "n=42, alpha=2.0")      # every place, the borders too
    W = tuned.model[0].weight.detach()
    x, g = torch.randn(5, inp, dtype=torch.float64), torch.randn(5, out, dtype=torch.float64)
    with torch.no_grad():
        term.at.add_(0.4 * torch.rand_like(term.at) - 0.2)   # numbers beside the places
    at, a = term.at.detach().round(), term.a.detach()
    (got,) = torch.autograd.grad(tuned.model(x), term.at, g)

    def loss(at):
        return float((F.linear(x, W + update(2.0, out, inp, a, at)) * g).sum())

    for axis, size in ((0, out), (1, inp)):
        for k in range(42):
            here = int(at[axis, k])
            up, down = min(here + 1, size - 1), max(here - 1, 0)
            moved = [at.clone() for _ in range(2)]
            moved[0][axis, k], moved[1][axis, k] = up, down
            want = (loss(moved[0]) - loss(moved[1])) / (up - down)
            assert float(got[axis, k]) == pytest.approx(want, rel=1e-6, abs=1e-8), (axis, k)


def test_a_side_of_one_has_no_neighbour():
    for inp, out, still in ((1, 9, 1), (9, 1, 0)):
        tuned, term = made(inp, out, "n=5")
        (got,) = torch.autograd.grad(tuned.model(torch.ones(2, inp).double()).square().sum(),
                                     term.at)
        assert not got[still].any() and got[1 - still].isfinite().all() and got[1 - still].any()


def test_neighbours_are_made_only_where_places_move(monkeypatch):
    tuned, term = made(12, 10)
    made_of, waves = [], Located._waves
    monkeypatch.setattr(Located, "_waves",
                        lambda self, *a: made_of.append(1) or waves(self, *a))
    with torch.no_grad():
        tuned.model(torch.ones(2, 12).double())
    assert len(made_of) == 1
    term.at.requires_grad_(False)
    term.dense()
    assert len(made_of) == 2


def test_entries_that_meet_add_up_and_are_counted():
    tuned, term = made(6, 5, "n=3, alpha=1.0")
    assert term.met == 0
    with torch.no_grad():
        term.at.copy_(torch.tensor([[1.0, 1.4, 2.0], [2.0, 1.6, 2.0]]))
    torch.testing.assert_close(term.dense(), update(1.0, 5, 6, term.a, term.at.detach().round()))
    assert term.met == 1
    with torch.no_grad():
        term.at.copy_(torch.tensor([[0.0, 1.0, 0.0], [5.0, 0.0, 4.0]]))
    assert term.met == 0
    term = Located(9, 3, torch.tensor([3 * 3 + 0, 0 * 3 + 1, 3]), 1.0)     # (3, 0), (0, 1), (1, 0)
    assert term.met == 0


def test_places_stay_in_the_matrix():
    _, term = made(6, 5, "n=4")
    with torch.no_grad():
        term.at.copy_(torch.tensor([[-3.0, 9.0, 2.3, 4.2], [-0.4, 1.0, 7.0, 5.6]]))
    assert [p.tolist() for p in term.places()] == [[0, 4, 2, 4], [0, 1, 5, 5]]
    term.confine()
    torch.testing.assert_close(term.at.detach(), torch.tensor(
        [[0, 4, 2.3, 4], [0, 1, 5, 5]], dtype=torch.float64))


def trained(steps, total, settings="", state=None):
    """(history of (a moved, places moved), tuned, term)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    tuned = burnish.tune(model, f"loca(n=9, coefficient_steps=2, location_steps=3, search=0.5, "
                         f"location_rate=20.0{settings})", head=False, targets="0")
    (_, term), = tuned.terms(Located)
    tuned.total_steps = total
    tuned.optimizer(lr=0.05)
    g, seen = torch.Generator().manual_seed(1), []
    batch = (torch.randn(16, 12, generator=g), torch.randn(16, 10, generator=g))
    for _ in range(steps):
        a, at = term.a.detach().clone(), term.at.detach().clone()
        tuned.step(batch, loss=lambda out, b: (out - b[1]).square().mean())
        seen.append((not torch.equal(a, term.a), not torch.equal(at, term.at)))
    return seen, tuned, term


def test_coefficients_and_places_move_by_turns_until_places_stay():
    seen, _, term = trained(20, 20)
    a, at = (True, False), (False, True)
    assert seen == [a, a, at, at, at, a, a, at, at, at] + [a] * 10
    start = trained(0, 20)[2]
    assert (term.at.detach().round() != start.at.detach().round()).any(), "a place has moved on"
    seen, _, _ = trained(14, None)
    assert seen == [a, a, at, at, at] * 2 + [a, a, at, at], "of a run of unknown length they go on"


def test_places_that_leave_come_back():
    _, tuned, term = trained(0, 100)
    with torch.no_grad():
        term.at[0].fill_(30.0), term.at[1].fill_(-30.0)
    batch = (torch.randn(16, 12), torch.randn(16, 10))
    for k in range(3):
        at = term.at.detach()
        assert (float(at.max()), float(at.min())) == (30, -30), k
        tuned.step(batch, loss=lambda out, b: (out - b[1]).square().mean())
    assert term.at[0].eq(9).all() and term.at[1].eq(0).all()


def test_either_keeps_its_moments_and_has_its_own_rate():
    _, tuned, term = trained(4, 100)
    opt = tuned.current_optimizer
    assert opt.state[term.a] and opt.state[term.at]
    rates = {id(p): g["lr"] for g in opt.param_groups for p in g["params"]}
    assert rates[id(term.at)] == pytest.approx(20 * rates[id(term.a)])
    assert {g["weight_decay"] for g in tuned.optimizer(weight_decay=0.5).param_groups} == {0.0}


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "loca(n=40)")
    assert torch.equal(net(**batch).logits, want)
    (_, one), (_, two), *_ = tuned.terms(Located)
    places = set(zip(*one.at.long().tolist(), strict=True))
    assert len(places) == 40 and not one.a.any() and not torch.equal(one.at, two.at)
    _, whole = made(6, 5, "n=30")
    assert len(set(zip(*whole.at.long().tolist(), strict=True))) == 30
    _, other = made(12, 10, "n=9, seed=5")
    assert not torch.equal(other.at, made(12, 10)[1].at)


def test_on_a_convolution_it_is_the_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3)).double()
    stock = copy.deepcopy(model[0])
    tuned = burnish.tune(model, "loca(n=9, alpha=2.0)", head=False, targets="0")
    (_, term), = tuned.terms(Located)
    stir(term.double(), size=0.3)
    with torch.no_grad():
        term.at.round_()
    at = term.at.detach().clone()
    term.at.requires_grad_(False)
    W = stock.weight.detach()
    follows(tuned, lambda x, a: F.conv2d(
        x, W + update(2.0, 5, 18, a, at.clamp(min=0)).view_as(W), stock.bias), [term.a],
        (2, 2, 5, 5))


def test_counts():
    (method,) = burnish.parse("loca")
    place = Place("a", "weight", "linear", 768, 768)
    coefficients = method.count(place) // 3              # and two numbers of the place of each
    net = tiny("roberta", meta=True, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
               num_attention_heads=12)[0]
    places = match(Anatomy.of(net), "q,v")
    assert sum(map(method.count, places)) == 3 * 24_000 and len(places) * coefficients == 24_000
    tuned, term = made(12, 10)
    assert sum(p.numel() for p in tuned.parameters()) == 27 and term.a.numel() == 9


def test_what_cannot_act_is_refused():
    with pytest.raises(RankError, match="loca: n=13 coefficients, 0.weight has 12"):
        burnish.tune(nn.Sequential(nn.Linear(4, 3)), "loca(n=13)", head=False, targets="0")
    burnish.tune(nn.Sequential(nn.Linear(4, 3)), "loca(n=12)", head=False, targets="0")
    for settings in ("n=0", "coefficient_steps=0", "location_steps=0"):
        with pytest.raises(RecipeError, match="loca: n, coefficient_steps and location_steps"):
            burnish.parse(f"loca({settings})")
    for settings in ("search=0", "search=1.1"):
        with pytest.raises(RecipeError, match="is a share of the run.*fourierft"):
            burnish.parse(f"loca({settings})")
    with pytest.raises(RecipeError, match="loca: location_rate multiplies"):
        burnish.parse("loca(location_rate=0)")
    assert burnish.parse("loca(n=1, coefficient_steps=1, location_steps=1, search=1.0)")


def test_defaults_and_cost():
    assert burnish.parse("loca")[0].settings() == {
        "targets": None, "n": 1000, "alpha": 1.0, "coefficient_steps": 10, "location_steps": 20,
        "search": 0.1, "location_rate": 10.0, "seed": 0}
    assert keeps_what_it_says("loca", "vit") is None
    assert burnish.parse("loca")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
