"""Essential sparsity: pruning by magnitude, its nested masks, and that every bit comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose import pruned as module
from burnish.blocks.choose.pruned import Pruned, PrunedRuns
from burnish.core.errors import ConfigError
from burnish.fit import figures
from burnish.methods.lifecycle.essential_sparsity import Curve, EssentialSparsity
from burnish.testing.models import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_smallest_go_over_all_weights_and_all_come_back(dtype, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)                    # several pieces of a weight
    torch.manual_seed(0)
    weights = [torch.randn(20, 30).to(dtype), torch.randn(50).to(dtype) * 3,
               torch.zeros(4, dtype=dtype)]
    was = [w.clone() for w in weights]
    every = torch.cat([w.flatten() for w in was]).abs().double()
    with Pruned(weights) as pruned:
        before = None
        for s in (0.0, 0.1, 0.35, 0.9):
            real = pruned.to(s)
            zero = torch.cat([(w == 0).flatten() for w in weights])
            assert real == (pytest.approx(zero.double().mean()) if s else 0)
            assert s <= real + 1 / len(every) <= s + 0.03
            assert every[zero].max() <= every[~zero].min() if s else True
            if before is not None:
                assert bool((zero | ~before).all())             # nested
            before = zero
            kept = torch.cat([w.flatten() for w in weights])[~zero]
            assert torch.equal(kept, torch.cat([w.flatten() for w in was])[~zero])
    assert all(torch.equal(a, b) for a, b in zip(weights, was, strict=True))


def test_what_differs_by_a_4096th_goes_apart_and_what_differs_by_less_together():
    with Pruned([1 + torch.arange(8.0) * 2**-13]) as pruned:
        assert pruned._counts(0).dtype == torch.int64, "as many as a model has"
        assert [pruned.to(s) for s in (0.1, 0.125, 0.3, 0.6)] == [0.0, 0.25, 0.25, 0.5]


def test_zeros_count_again_after_a_restore_and_one_entry_is_a_whole():
    W = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with Pruned([W]) as pruned:
        for _ in range(2):
            assert pruned.to(0.5) == 0.5
            pruned.restore()
            assert W.tolist() == [0.0, 1.0, 2.0, 3.0]
    with Pruned([torch.ones(1)]) as one:
        assert one.to(1.0) == 1.0


def test_layer_by_layer_each_loses_its_share():
    torch.manual_seed(0)
    weights = [torch.randn(40, 25), torch.randn(40, 25) * 100]
    with Pruned(weights, together=False) as pruned:
        assert pruned.to(0.3) == pytest.approx(0.3, abs=0.01)
        for w in weights:
            assert float((w == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_the_control_takes_any():
    torch.manual_seed(0)
    weights = [torch.randn(100, 50), torch.randn(100, 50)]
    was = [w.clone() for w in weights]
    with Pruned(weights, seed=1) as one:
        one.to(0.2)
        some = [w == 0 for w in weights]
        assert one.to(0.5) == pytest.approx(0.5, abs=0.01)
        assert all(bool((w[m] == 0).all()) for w, m in zip(weights, some, strict=True))
        gone = was[0][weights[0] == 0].abs().mean()
        assert float(gone) == pytest.approx(float(was[0].abs().mean()), rel=0.05)
        assert not torch.equal(weights[0] == 0, weights[1] == 0)
    assert torch.equal(weights[0], was[0])


def test_an_error_while_scoring_puts_everything_back():
    model, _ = tiny("llama")
    was = {n: t.clone() for n, t in model.state_dict().items()}
    calls = []

    def score(m):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no")
        return 1.0

    with pytest.raises(RuntimeError, match="^no$"):
        EssentialSparsity().lifecycle(model, score=score)
    assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items())


def test_the_curve_begins_with_the_model_and_leaves_embeddings_norms_and_heads():
    model, batch = tiny("llama")
    model.eval()
    was = {n: t.clone() for n, t in model.state_dict().items()}
    want = -float(model(**batch).loss.detach())
    seen = []

    def score(m):
        seen.append({n for n, t in m.state_dict().items() if bool((t != was[n]).any())})
        return -float(m(**batch).loss.detach())

    curve = EssentialSparsity(grid=(0.2, 0.6)).lifecycle(model, score=score)
    assert curve.points[0] == (0.0, want) and seen[0] == set()
    assert [s for s, _ in curve.points] == pytest.approx([0, 0.2, 0.6], abs=0.01)
    assert seen[2] == {n for n in was if "layers" in n and "norm" not in n}
    only = EssentialSparsity(grid=(0.5,), targets="q").lifecycle(model, score=score)
    assert len(only.points) == 2 and seen[-1] == {n for n in was if "q_proj" in n}
    assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items())


def test_what_is_reported():
    flat = Curve([(0.0, 0.9), (0.3, 0.9), (0.5, 0.895), (0.7, 0.6), (0.9, 0.1)], 0.01)
    assert flat.essential == 0.5 and flat.knee == 0.5
    assert Curve(flat.points, 0.0).essential == 0.3
    assert Curve([(0.0, -2.0), (0.5, -2.01), (0.9, -4.0)], 0.01).essential == 0.5
    assert Curve([(0.0, 1.0), (0.1, 0.5), (0.2, 0.495)], 0.01).essential == 0.0
    assert Curve([(0.0, 1.0), (0.5, 1.0)], 0.01).knee == 0.0
    # both axes count for 1: points at (s / last, (p - P(0)) / fall)
    assert Curve([(0.0, 1.0), (0.3, 0.95), (0.6, 0.6), (1.0, 0.5)], 0.01).knee == 0.3
    assert Curve([(0.0, 1.0), (0.1, 0.99), (0.4, 0.9), (0.5, 0.5)], 0.01).knee == 0.4
    assert Curve([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)], 0.01).knee == 0.0
    assert Curve([(0.0, 1.0), (0.5, 0.2), (1.0, 0.0)], 0.01).knee == 0.0
    assert Curve([(0.0, 0.0), (0.5, 0.9), (1.0, 1.0)], 0.01).knee == 0.5


def test_settings():
    (method,) = burnish.parse("essential_sparsity")
    assert method.settings() == {
        "targets": None, "grid": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "drop": 0.01,
        "ranking": "global", "order": "magnitude", "seed": 0, "runs": 0}
    for wrong, words in (("grid=()", "grid="), ("grid=0.5", "grid=0.5"),
                         ("grid=(0.2, 0.1)", "rising shares"),
                         ("grid=(0.0, 0.1)", "rising"), ("grid=(0.5, 1.0)", "rising"),
                         ("drop=-0.1", "drop=-0.1"), ("seed=3", "seed does nothing"),
                         ("runs=1", "expected 2 inputs"), ("runs=-4", "expected 2 inputs"),
                         ("runs=4, grid=(0.5,)", "grid does nothing beside runs=4"),
                         ("runs=4, ranking='layer'", "ranking does nothing")):
        with pytest.raises(ConfigError, match=words):
            burnish.parse(f"essential_sparsity({wrong})")
    assert burnish.parse("essential_sparsity(order='random', seed=3, drop=0.0)")
    with pytest.raises(ConfigError, match="grid=0.5: expected rising shares"):
        EssentialSparsity(grid=0.5)                            # not by way of a recipe's words
    with pytest.raises(ConfigError, match="name them whole"):
        burnish.parse("essential_sparsity(targets='q')")[0].lifecycle(
            tiny("gpt2")[0], score=lambda m: 0.0)


def test_each_ranking_and_order_is_another_curve():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(50)
    x = torch.randn(8, 40)

    def score(m):
        return float(m(x).square().mean())

    found = [burnish.parse(f"essential_sparsity(grid=(0.4,), targets='*'{more})")[0].lifecycle(
        model, score=score).points[1] for more in ("", ", ranking='layer'", ", order='random'",
                                                   ", order='random', seed=1")]
    assert len({p for _, p in found}) == 4

    def largest(m):                                  # the global ranking spares the large weights
        return float((m[1].weight == 0).float().mean())

    assert burnish.parse("essential_sparsity(grid=(0.4,), targets='*')")[0].lifecycle(
        model, score=largest).points[1][1] < 0.05
    assert all(s == pytest.approx(0.4, abs=0.01) for s, _ in found)


# -- patterns --------------------------------------------------------------------------------------
def pattern(W, n, m):
    """In plain Python: of every m inputs in a row the n largest, of equal ones the later."""
    out = W.clone()
    for row in out:
        for at in range(0, len(row), m):
            order = sorted(range(at, at + m), key=lambda i: abs(float(row[i])))
            for i in order[: m - n]:
                row[i] = 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [4, 8])
def test_runs_keep_their_largest_and_all_comes_back(m, dtype):
    torch.manual_seed(0)
    stored = [torch.randn(6, 16).to(dtype), torch.randn(8, 10).to(dtype),
              torch.randn(2, 3, 8).to(dtype)]
    stored[0][0, :3] = 0.0
    stored[0][1, 1] = -0.0
    was = [w.clone() for w in stored]
    views = [stored[0], stored[1].t(), stored[2]]              # one is stored across
    begin = [v.clone() for v in views]
    with PrunedRuns(views, m) as runs:
        for n in range(m - 1, 0, -1):
            assert runs.to(n) == pytest.approx((m - n) / m)
            for v, b in zip(views, begin, strict=True):
                for a, c in zip(v.flatten(0, -2), b.flatten(0, -2), strict=True):
                    assert torch.equal(a, pattern(c[None], n, m)[0])
        assert sum(len(v) for _, _, v in runs.taken) <= sum(w.numel() for w in stored)
    for a, b in zip(stored, was, strict=True):
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def test_what_runs_put_back_is_put_back_once():
    W = torch.arange(1.0, 9.0).view(2, 4)
    with PrunedRuns([W], 4) as runs:
        runs.to(1)
        runs.restore()
        assert W.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        W.neg_()                                     # from here on it is somebody else's
    assert W.flatten().tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]


def test_the_control_of_runs_takes_any_and_nests():
    torch.manual_seed(0)
    W = torch.randn(40, 16)
    was, zero = W.clone(), None
    with PrunedRuns([W, W.clone()], 4, seed=2) as runs:
        for n in (3, 2, 1):
            runs.to(n)
            assert bool(((W != 0).view(40, 4, 4).sum(-1) == n).all())
            assert zero is None or bool((W[zero] == 0).all())
            zero = W == 0
        assert float(was[zero].abs().mean()) == pytest.approx(float(was.abs().mean()), rel=0.1)
        assert not torch.equal(runs.weights[0] == 0, runs.weights[1] == 0)
    assert torch.equal(W, was)


def test_a_curve_of_patterns():
    model, _ = tiny("gpt2")
    was = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []

    def score(m):
        W = m.transformer.h[0].mlp.c_fc.weight               # stored (in, out)
        seen.append((W != 0).t().reshape(-1, 4).sum(-1).unique().tolist())
        return float(len(seen))

    stored = EssentialSparsity(grid=(0.5,)).lifecycle(model, score=lambda m: 1.0)
    assert len(stored.points) == 2, "shares go by what is stored, whichever way"
    curve = EssentialSparsity(runs=4).lifecycle(model, score=score)
    assert curve.points == [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 4.0)]
    assert seen == [[4], [3], [2], [1]] and curve.size is None
    assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items())
    with pytest.raises(ConfigError, match="runs of 5 inputs do not tile .*; leave it out"):
        EssentialSparsity(runs=5).lifecycle(model, score=score)


# -- what it suggests ------------------------------------------------------------------------------
def test_the_size_below_which_all_is_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    every = model[0].weight.detach().abs().flatten()
    zeros = []

    def score(m):
        zeros.append(m[0].weight == 0)
        return 1.0

    (method,) = burnish.parse("essential_sparsity(grid=(0.3, 0.6), targets='*')")
    curve = method.lifecycle(model, score=score)
    assert len(curve.sizes) == 3 and curve.sizes[0] == 0.0
    for size, zero in zip(curve.sizes[1:], zeros[1:], strict=True):
        assert torch.equal(every < size, zero.flatten())
    assert curve.essential == curve.points[2][0] and curve.size == curve.sizes[2]
    for more in ("ranking='layer'", "order='random'", "runs=4"):
        grid = "" if "runs" in more else "grid=(0.3,), "
        other = burnish.parse(f"essential_sparsity({grid}targets='*', {more})")[0]
        assert other.lifecycle(model, score=score).size is None


def test_suggestions_are_recipes():
    points = [(0.0, 0.9), (0.25, 0.9), (0.5, 0.895), (0.75, 0.1)]
    method = EssentialSparsity()
    said = method.suggests(Curve(points, 0.01, [0.0, 1e-3, 0.00234567, 0.1]))
    assert said == ["sara(tau=0.00235)", "snell(s=0.5)", "pst(ratio=0.5)",
                    "magnitude(ratio=0.5, mask='matrix') + dsee"]
    assert method.suggests(Curve(points, 0.01)) == said[1:]
    runs = EssentialSparsity(runs=4).suggests(Curve(points, 0.01))
    assert runs == ["magnitude(mask='2:4') + dsee"]
    assert all(burnish.parse(text) for text in [*said, *runs])
    assert method.suggests(Curve([(0.0, 1.0), (0.5, 0.1)], 0.01, [0.0, 1.0])) == []
    assert EssentialSparsity(order="random").suggests(Curve(points, 0.01)) == []


def test_the_picture():
    points = [(0.0, 0.9), (0.3, 0.9), (0.5, 0.6)]
    drawn = figures.sparsity(points, 0.3, 0.3)
    assert drawn.startswith("<svg") and drawn == figures.sparsity(points, 0.3, 0.3)
    assert drawn != figures.sparsity(points, 0.3, 0.3, points[:2] + [(0.5, 0.2)])
    assert drawn != figures.sparsity(points, 0.5, 0.3) != figures.sparsity(points, 0.5, 0.5)
    assert figures.sparsity(points[:1], 0.0, 0.0) == ""
