"""AdaMSS: updates of clusters of outputs, against their sums in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

import burnish
from burnish.blocks.weight import clustered
from burnish.blocks.weight.clustered import Clustered, clusters, leading
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=6, clusters=3, each=2", size=(9, 12)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size))
    tuned = burnish.tune(model, f"adamss({settings})", head=False, targets="*")
    (_, term), = tuned.terms(Clustered)
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_sums():
    """Output by output: the base's row, and what its cluster reads of V x times its own."""
    model, tuned, term = made()
    model.double()
    W, bias = (t.detach().clone() for t in (model[0].weight, model[0].bias))
    V, at = term.V.clone(), term.cluster.tolist()
    assert sorted(set(at)) == [0, 1, 2]
    term.B.data.normal_(), term.A.data.normal_()

    def equation(x, A, B):
        rows = [W[o] + sum(B[o, j] * A[at[o], j] for j in range(2)) @ V for o in range(12)]
        return F.linear(x, torch.stack(rows), bias)

    follows(tuned, equation, [term.A, term.B], (5, 3, 9))


def test_the_start():
    """V are leading right directions, A those of a cluster's rows of U, B nothing."""
    model, _, term = made()
    W = model[0].weight.detach().double()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    best = (W - W @ Vt[:6].t() @ Vt[:6]).norm()
    V = term.V.double()
    torch.testing.assert_close(V @ V.t(), torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float((W - W @ V.t() @ V).norm()) < 1.2 * float(best)
    assert not term.B.any()
    rows, _ = leading(model[0].weight, 6, 0)
    assert torch.equal(term.cluster, clusters(rows, 3))
    for c, A in enumerate(term.A.detach()):
        mine = rows[term.cluster == c]
        s = min(2, len(mine))
        want = torch.linalg.svd(mine.double()).Vh[:s]
        torch.testing.assert_close((A[:s].double() * want).sum(1).abs(),
                                   torch.ones(s, dtype=torch.float64), atol=1e-5, rtol=0)
        assert not A[s:].any()


def test_directions_below_the_threshold_are_left_out():
    """Squares over the first's; the first is always there."""
    rows = torch.diag(torch.tensor([1.0, 0.8, 0.5])).repeat(2, 1)
    for threshold, want in ((None, 3), (0.0, 3), (0.25, 2), (0.6, 2), (0.7, 1), (0.99, 1)):
        term = Clustered(6, 5, 3, 1, 3)
        term.begin(rows, torch.zeros(3, 5), torch.zeros(6, dtype=torch.long), threshold)
        assert int(term.A.abs().sum(-1).gt(0).sum()) == want, threshold


def test_a_small_cluster_has_fewer_directions_and_they_stay_nothing():
    _, tuned, term = made("rank=6, clusters=12, each=2")
    assert (term.A.detach().abs().sum(-1) > 0).tolist() == [[True, False]] * 12
    x = torch.randn(7, 9)
    optimizer = tuned.optimizer(lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned.model(x).square().sum().backward()
        optimizer.step()
    assert term.B[:, 0].any() and not term.A[:, 1].any() and not term.B[:, 1].any()


@pytest.mark.parametrize("n, k, width, seed", [(40, 5, 6, 0), (200, 7, 3, 1), (33, 3, 20, 2),
                                               (9, 9, 4, 3), (64, 1, 4, 4), (300, 10, 2, 5)])
def test_the_clusters_are_those_of_k_means(n, k, width, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=g)
    want = KMeans(k, init="random", n_init=1, max_iter=10, random_state=123456789).fit_predict(
        rows.numpy())
    assert clusters(rows, k).tolist() == want.tolist()
    assert len(clusters(rows[:3], 5).unique()) == 3


def test_passes_and_seed_of_k_means():
    rows = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    for passes, seed in ((1, 5), (2, 5), (40, 7)):
        want = KMeans(6, init="random", n_init=1, max_iter=passes, random_state=seed).fit_predict(
            rows.numpy())
        assert clusters(rows, 6, passes, seed).tolist() == want.tolist()


def test_an_empty_cluster_takes_the_farthest_row():
    X = torch.tensor([[0.0], [0.2], [5.0], [9.0]]).numpy()
    labels = torch.tensor([0, 0, 0, 1]).numpy()
    far = torch.tensor([0.1, 0.3, 4.0, 0.0]).numpy()
    assert clustered._means(X, labels, far, 3).flatten().tolist() == pytest.approx([0.1, 9, 5])


def test_the_sketch_is_its_seeds_and_leaves_other_draws_alone():
    W = torch.randn(40, 30)
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    a, b, c = leading(W, 5, 0), leading(W, 5, 0), leading(W, 5, 1)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    assert a[0].shape == (40, 5) and a[1].shape == (5, 30)
    assert leading(W, 500, 0)[1].shape == (30, 30)
    for M in (W, W.t()):                         # tall and wide
        torch.manual_seed(1)
        U, _, V = torch.svd_lowrank(M, q=5, niter=2)
        got = leading(M, 5, 1)
        torch.testing.assert_close(got[0], U, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], V.t(), rtol=1e-4, atol=1e-5)


def test_the_base_stays_and_a_small_matrix_has_the_rank_it_can():
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "adamss")
    assert torch.equal(net(**batch).logits, want)
    assert {t.V.shape[0] for _, t in tuned.terms(Clustered)} <= {16, 32}


def test_counts_and_defaults():
    m = parse("adamss")[0]
    assert (m.rank, m.clusters, m.each, m.threshold, m.seed) == (100, 5, 1, None, 0)
    place = Place("q", "weight", "linear", 768, 512)
    assert m.count(place) == 5 * 100 + 768 and m.per_token(place) == 100
    assert parse("adamss(each=3)")[0].count(place) == 3 * (500 + 768)
    small = Place("q", "weight", "linear", 4, 50)
    assert m.count(small) == 4 * 4 + 4 and m.per_token(small) == 4
    assert keeps_what_it_says("adamss", "vit") is None


@pytest.mark.parametrize("settings, why", [
    ("rank=0", "at least 1"), ("clusters=0", "at least 1"), ("each=0", "at least 1"),
    ("threshold=1.0, each=2", "a share from 0"), ("threshold=-0.1, each=2", "a share from 0"),
    ("threshold=0.1", "each=1 it has one")])
def test_what_it_refuses(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"adamss({settings})")


def test_a_weight_that_is_not_finite():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight.data[1, 2] = float("inf")
    with pytest.raises(CheckError, match="holds inf or nan"):
        burnish.tune(net, "adamss", head=False, targets="*")
