"""Essential sparsity: pruning by magnitude, its nested masks, and that every bit comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose import pruned as module
from burnish.blocks.choose.pruned import Pruned
from burnish.core.errors import ConfigError
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
        "ranking": "global", "order": "magnitude", "seed": 0}
    for wrong, words in (("grid=()", "grid="), ("grid=0.5", "grid=0.5"),
                         ("grid=(0.2, 0.1)", "rising shares"),
                         ("grid=(0.0, 0.1)", "rising"), ("grid=(0.5, 1.0)", "rising"),
                         ("drop=-0.1", "drop=-0.1"), ("seed=3", "seed does nothing")):
        with pytest.raises(ConfigError, match=words):
            burnish.parse(f"essential_sparsity({wrong})")
    assert burnish.parse("essential_sparsity(order='random', seed=3, drop=0.0)")
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
