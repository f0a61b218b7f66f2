"""DaMo: mixtures foretold from proxies, against refits and a known surface, in float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.choose import mixtures
from burnish.core.errors import ConfigError


def shares(n, s, seed=3):
    w = torch.rand(n, s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w / w.sum(1, keepdim=True)


def design(w, degree):
    """Term by term."""
    rows = []
    for row in w.tolist():
        s = len(row)
        rows.append(row + ([row[i] * row[j] for i in range(s) for j in range(i + 1, s)]
                           if degree == 2 else []))
    return torch.tensor(rows, dtype=torch.float64)


def ridge(X, y, strength):
    """(coefficients, centre, mean) by the augmented least squares problem."""
    centre, mean = X.mean(0), y.mean()
    below = (len(X) * strength) ** 0.5 * torch.eye(X.shape[1], dtype=torch.float64)
    A = torch.cat([X - centre, below])
    b = torch.cat([y - mean, torch.zeros(X.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0], centre, mean


@pytest.mark.parametrize("degree", [1, 2])
def test_the_fit_is_the_ridge_and_its_error_that_of_leaving_one_out(degree):
    w = shares(14, 3)
    y = (w**2).sum(1) + 0.05 * torch.sin(40 * w[:, 0])
    got = mixtures.fitted(w, y, degree)
    X, n = design(w, degree), len(w)
    b, centre, mean = ridge(X, y, got.strength)
    torch.testing.assert_close(got(w), mean + (X - centre) @ b, rtol=1e-7, atol=1e-9)

    def error(strength):
        """The intercept is free, and l the same when one is left out."""
        left = []
        for i in range(n):
            keep = torch.arange(n) != i
            Xk, yk = X[keep], y[keep]
            b, c, m = ridge(Xk, yk, strength * n / (n - 1))
            left.append(float(y[i] - m - (X[i] - c) @ b))
        return (sum(e * e for e in left) / n) ** 0.5

    assert got.error == pytest.approx(error(got.strength), rel=1e-6)
    assert got.error <= min(error(s) for s in mixtures.GRID) * (1 + 1e-9)


def test_a_surface_of_its_own_form_is_found_again():
    true = torch.tensor([0.2, 0.5, 0.1, 1.5, -0.8, 0.4], dtype=torch.float64)
    w, other = shares(20, 3), shares(50, 3, seed=9)
    got = mixtures.fitted(w, design(w, 2) @ true)
    torch.testing.assert_close(got(other), design(other, 2) @ true, rtol=1e-3, atol=1e-3)
    peak = mixtures.best(got, 3, 0)
    grid = torch.tensor([[i, j, 100 - i - j] for i in range(101) for j in range(101 - i)],
                        dtype=torch.float64) / 100
    assert design(peak[None], 2) @ true >= (design(grid, 2) @ true).max() - 2e-3


def test_mixtures_begin_with_all_alike_and_each_alone():
    w = mixtures.drawn(3, 40, 0)
    assert torch.equal(w[1:4], torch.eye(3).double()) and torch.allclose(w[0], w[0].mean())
    assert torch.allclose(w.sum(1), torch.ones(40).double()) and (w >= 0).all()
    assert torch.equal(w, mixtures.drawn(3, 40, 0)) and len(mixtures.drawn(3, 2, 0)) == 2
    assert not torch.equal(w, mixtures.drawn(3, 40, 1))
    assert abs(float(w[4:].mean()) - 1 / 3) < 1e-9 and w[4:].std(0).min() > 0.15


def world():
    """Sets a, b, c of numbered rows; what is learnt is how many of each were seen."""
    data = {n: [(n, i) for i in range(200)] for n in "abc"}
    best = {"a": 0.6, "b": 0.4, "c": 0.0}

    def train(rows):
        return {n: sum(r[0] == n for r in rows) / len(rows) for n in "abc"}

    def score(model, held):
        return 1 - sum((model[n] - best[n]) ** 2 for n in "abc")

    return data, train, score


def test_the_mixture_is_found():
    data, train, score = world()
    (method,) = burnish.parse("damo(trials=12)")
    found = method.lifecycle(data, train, score, held=[("a", 0)], count=400)
    assert len(found.tried) == 12 and found.chosen == found.shares
    assert found.shares["a"] == pytest.approx(0.6, abs=0.07)
    assert found.shares["c"] == pytest.approx(0.0, abs=0.07)
    assert found.measured > max(y for _, y in found.tried) - 0.01
    assert found.foretold == pytest.approx(found.measured, abs=0.03)
    assert "foretold" in str(found) and len(str(found).splitlines()) == 15
    rows = method.rows(data, 1000, found.chosen)
    assert abs(sum(n == "a" for n, _ in rows) / 1000 - found.chosen["a"]) < 0.06


def test_what_does_not_hold_up_is_not_taken():
    data, train, score = world()
    calls = []

    def bad(model, held):
        calls.append(1)
        return score(model, held) if len(calls) <= 8 else -1.0

    found = burnish.parse("damo(trials=8)")[0].lifecycle(data, train, bad, held=[], count=200)
    assert found.measured == -1.0
    assert found.chosen == max(found.tried, key=lambda t: t[1])[0] != found.shares


def test_held_out_rows_are_not_trained_on():
    data, _, score = world()
    seen = set()

    def train(rows):
        seen.update(rows)
        return {n: sum(r[0] == n for r in rows) / len(rows) for n in "abc"}

    held = [("a", i) for i in range(100)]
    burnish.parse("damo(trials=4)")[0].lifecycle(data, train, score, held=held, count=300)
    assert seen and not seen & set(held)


def test_its_settings_and_the_least_that_acts():
    assert burnish.parse("damo")[0].settings() == {"targets": None, "trials": 12, "degree": 2,
                                                   "seed": 0}
    data, train, score = world()
    found = burnish.parse("damo(trials=3, degree=1)")[0].lifecycle(
        {n: data[n] for n in "ab"}, train, score, held=[], count=1)      # two sets, a row a proxy
    assert len(found.tried) == 3 and set(found.shares) == {"a", "b"}


def test_refusals():
    with pytest.raises(ConfigError, match="targets='q' does nothing"):
        burnish.parse("damo(targets='q')")
    for bad in ("trials=2", "degree=3"):
        with pytest.raises(ConfigError, match="trials of at least 3 and a degree of 1 or 2"):
            burnish.parse(f"damo({bad})")
    data, train, score = world()
    (method,) = burnish.parse("damo(trials=4)")
    with pytest.raises(ConfigError, match="two data sets or more"):
        method.lifecycle({"a": data["a"]}, train, score, held=[], count=10)
    with pytest.raises(ConfigError, match="trials of a row or more"):
        method.lifecycle(data, train, score, held=[], count=0)
    with pytest.raises(ConfigError, match="every row of 'b' is held out"):
        method.lifecycle(data, train, score, held=data["b"], count=10)
    with pytest.raises(ConfigError, match="is no number"):
        method.lifecycle(data, train, lambda m, h: float("nan"), held=[], count=10)
    with pytest.raises(ConfigError, match="three mixtures or more"):
        mixtures.fitted(shares(2, 3), [0.1, 0.2])
