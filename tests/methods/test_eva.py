"""EVA against a PCA of all the data at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.methods.delta.start.eva import allot
from burnish.testing.models import tiny


class Two(nn.Module):
    """Two linears whose inputs have falling spectra of different steepness."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def data(seed=0, n=3):
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, 12, dtype=torch.float64)
    return [torch.randn(40, 12, generator=g, dtype=torch.float64) * scale + 0.5 for _ in range(n)]


def pca(X):
    centred = X - X.mean(0)
    _, S, V = torch.linalg.svd(centred, full_matrices=False)
    return S, V, S.square() / centred.square().sum()


def test_a_is_the_principal_directions_and_ranks_go_where_the_variance_is():
    torch.manual_seed(0)
    net, xs = Two().double(), data()
    with torch.no_grad():
        inputs = {"a": torch.cat(xs), "b": torch.tanh(net.a(torch.cat(xs)))}
        base = net(xs[0])
    tuned = burnish.tune(net, "eva(rank=3, alpha=6, tolerance=1.01)", targets="a,b", head=False,
                         calibration=xs)                # a cosine no direction reaches: all is read
    assert torch.equal(net(xs[0]), base)
    shares = {n: pca(X)[2][: 6 if n == "a" else 5] for n, X in inputs.items()}
    order = sorted(((-float(v), n) for n, vs in shares.items() for v in vs))[:6]
    want = {n: sum(m == n for _, m in order) for n in shares}
    got = {n.removesuffix(".weight"): v["rank"]
           for n, v in tuned.adapters["default"].settled["eva"].items()}
    assert got == want and sum(got.values()) == 6
    for n, rank in want.items():
        term = getattr(net, n).burnish.default["eva"]
        assert term.A.shape[0] == rank and term.scale == 2.0 and not term.B.any()
        torch.testing.assert_close(term.A @ term.A.t(), torch.eye(rank), rtol=0, atol=1e-5)
        V = pca(inputs[n])[1][:rank].float()
        least = torch.linalg.svdvals(V.double() @ term.A.detach().double().t()).min()
        assert float(least) > 1 - 5e-5, "the largest principal angle is below a hundredth"


def test_whitening_divides_by_the_root_of_s():
    net, xs = Two().double(), data()
    burnish.tune(net, "eva(rank=2, rho=6, whiten=True, tolerance=1.01)", targets="a", head=False,
                 calibration=xs)
    S, V, _ = pca(torch.cat(xs))
    rows = V[:2] / S[:2].sqrt().unsqueeze(1)
    torch.testing.assert_close(net.a.burnish.default["eva"].A.detach().abs(), rows.abs().float(),
                               rtol=1e-4, atol=1e-6)


def test_rho_of_one_gives_all_the_same():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "eva(rank=4, rho=1)", calibration=[batch])
    assert {v["rank"] for v in tuned.adapters["default"].settled["eva"].values()} == {4}
    with pytest.raises(RecipeError, match="rho is at least 1"):
        burnish.parse("eva(rho=0.5)")


def test_the_allotment_is_the_budget_largest_shares():
    p, q = (Place(n, "weight", "linear", 8, 8) for n in "pq")
    shares = {p: torch.tensor([.5, .2, .1]), q: torch.tensor([.6, .1, .1])}
    assert allot(shares, 2) == {p: 1, q: 1}
    assert allot(shares, 3) == {p: 2, q: 1}
    assert allot(shares, 4) == {p: 2, q: 2}, "of equal shares the lower component goes first"
    assert allot({p: torch.tensor([.9, .8]), q: torch.tensor([.1])}, 2) == {p: 2, q: 0}


def test_a_matrix_that_gets_nothing_is_left_alone():
    torch.manual_seed(0)
    net = Two().double()
    xs = [torch.randn(200, 12, dtype=torch.float64) for _ in range(3)]     # a's: all alike
    with torch.no_grad():
        net.a.weight.mul_(1e-3)
        net.a.weight[0, 0] = net.a.weight[1, 1] = 50     # b's input: two directions, no others
    tuned = burnish.tune(net, "eva(rank=1, rho=2)", targets="a,b", head=False, calibration=xs)
    ranks = {n: v["rank"] for n, v in tuned.adapters["default"].settled["eva"].items()}
    assert ranks == {"a.weight": 0, "b.weight": 2}
    for name, rank in ranks.items():
        has = hasattr(net.get_submodule(name.removesuffix(".weight")), "burnish") and \
            "default" in net.get_submodule(name.removesuffix(".weight")).burnish._modules
        assert has == bool(rank)


def test_reading_stops_once_the_directions_in_use_stand():
    read = []

    def endless():
        x = data(n=1)[0]
        while True:
            read.append(1)
            yield x

    burnish.tune(Two().double(), "eva(rank=2)", targets="a,b", head=False, calibration=endless())
    assert 2 <= len(read) <= 4


def test_ranks_come_back_from_the_file(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "eva(rank=4)", calibration=[batch])
    ranks = tuned.adapters["default"].settled
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    assert again.adapters["default"].settled == ranks
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    again.save(tmp_path / "b")
    third, _ = tiny("llama")
    burnish.load(third, tmp_path / "b")
    third.eval()
    assert torch.equal(net(**batch).logits, third(**batch).logits)


def test_defaults_are_the_published_ones():
    assert burnish.parse("eva")[0].settings() == {
        "targets": None, "rank": 16, "alpha": 16.0, "rho": 2.0, "tolerance": 0.99, "whiten": False,
        "samples": None}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "eva(rank=3)", targets="0", head=False,
                         calibration=[torch.randn(8, 16)])
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("settings", ["rho=1.0"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"eva({settings})")


@pytest.mark.parametrize("settings", ["rho=0.99"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^eva"):
        burnish.parse(f"eva({settings})")


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 17 does not fit"):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), "eva(rank=17)",
                     targets="0", head=False, calibration=[torch.randn(4, 16)])


def test_a_matrix_gets_no_more_than_its_smaller_side():
    torch.manual_seed(0)
    net, xs = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 12)).double(), data()
    tuned = burnish.tune(net, "eva(rank=2, rho=6, tolerance=1.01)", targets="*", head=False,
                         calibration=xs)
    ranks = {n: v["rank"] for n, v in tuned.adapters["default"].settled["eva"].items()}
    assert sum(ranks.values()) == 4 and max(ranks.values()) == 2


def test_places_that_share_their_input_are_read_until_the_larger_rank_stands():
    from types import SimpleNamespace

    (method,) = burnish.parse("eva(rank=2, rho=2)")
    wide, narrow, lone = (Place(n, "weight", "linear", out, 8)
                          for n, out in (("p", 8), ("q", 2), ("r", 8)))
    assert method.observe(wide).k == 4 and method.observe(wide).tolerance == 0.99
    both = SimpleNamespace(explained=torch.tensor([.5, .4, .3, .2]), needed=torch.tensor(4))
    weak = SimpleNamespace(explained=torch.full((4,), .01), needed=torch.tensor(4))
    ranks = method.settle({wide: both, narrow: both, lone: weak})
    assert {p.path: r["rank"] for p, r in ranks.items()} == {"p": 4, "q": 2, "r": 0}
    assert int(both.needed) == 4 and int(weak.needed) == 0


def test_the_count_of_a_rank():
    (method,) = burnish.parse("eva(rank=4)")
    place = Place("l", "weight", "linear", 24, 16)
    assert (method.count(place), method.count(place, rank=3)) == (4 * 40, 3 * 40)
    assert (method.per_token(place), method.per_token(place, rank=3)) == (4, 3)


def test_a_rank_of_nothing_makes_no_term():
    from types import SimpleNamespace

    (method,) = burnish.parse("eva(rank=2)")
    site = SimpleNamespace(place=Place("p", "weight", "linear", 8, 8), settled={"rank": 0},
                           seen=None, weight=torch.zeros(8, 8))
    assert method.delta(site) is None


def test_equal_shares_go_to_the_lower_component_and_then_the_earlier_place():
    q, p = (Place(n, "weight", "linear", 8, 8) for n in "qp")       # q stands first
    shares = {q: torch.tensor([.2, .2]), p: torch.tensor([.2, .2])}
    assert [tuple(allot(shares, n).values()) for n in range(5)] == \
        [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
