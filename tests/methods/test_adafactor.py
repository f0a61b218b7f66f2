"""Adafactor: against a dense fp64 reference from the equations, its few bytes, and resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.composed import Composed
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse
from burnish.testing.models import tiny
from burnish.testing.ran import Allocations, Living


def gradients(shape, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) * 10.0**(k % 3 - 1)
            for k in range(steps)]


def rms(x):
    return x.square().mean().sqrt()


def reference(W, Gs, lr, c=0.8, d=1.0, beta1=0.0, scaled=False, wd=0.0):
    """Dense, in fp64: V is formed."""
    R = C = V = 0.0
    M = torch.zeros_like(W)
    for t, G in enumerate(Gs, 1):
        b = 1 - t**-c
        S = G**2 + 1e-30
        if W.dim() == 2:
            R, C = b * R + (1 - b) * S.mean(1), b * C + (1 - b) * S.mean(0)
            V = torch.outer(R, C) / R.mean()
        else:
            V = b * V + (1 - b) * S
        U = G / V.sqrt()
        U = U / max(1.0, float(rms(U) / d))
        M = beta1 * M + (1 - beta1) * U
        step = M * max(1e-3, float(rms(W))) if scaled else M
        W = W * (1 - lr * wd) - lr * step
    return W


def ours(recipe, W, Gs, lr):
    p = nn.Parameter(W.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("w", p)], lr)
    for G in Gs:
        p.grad = G.clone()
        opt.step()
    return p, opt


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7,)])
@pytest.mark.parametrize("settings", [{}, {"beta1": 0.9}, {"scaled": True}, {"wd": 0.1},
                                      {"c": 0.6, "d": 0.5}, {"beta1": 0.9, "scaled": True}])
@pytest.mark.parametrize("strip", [None, 20])
def test_steps_are_the_equations(shape, settings, strip, monkeypatch):
    """Whole, and some rows at a time."""
    if strip:
        monkeypatch.setattr(Composed, "_slice", staticmethod(lambda device: strip))
        monkeypatch.setattr("burnish.blocks.update.factored.strip", lambda device: strip // 2)
    words = {"c": "decay_rate", "d": "clip", "scaled": "scale_parameter", "wd": "weight_decay"}
    text = ", ".join(f"{words.get(k, k)}={v}" for k, v in settings.items())
    W = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    Gs = gradients(shape, 6)
    p, _ = ours(f"full + adafactor({text})", W, Gs, 0.03)
    torch.testing.assert_close(p.detach(), reference(W, Gs, 0.03, **settings), rtol=1e-9,
                               atol=1e-12)


@pytest.mark.parametrize("recipe", ["adafactor", "adafactor + master_weights",
                                    "adafactor(beta1=0.9, scale_parameter=True) + kahan"])
def test_a_half_precision_gradient_is_left_as_it_came_and_none_is_widened_whole(recipe,
                                                                               monkeypatch):
    for where in ("blocks.update.factored.strip", "blocks.update.composed.strip"):
        monkeypatch.setattr(f"burnish.{where}", lambda device: 2048)
    p = nn.Parameter(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16())
    opt = compose([m.optimizer() for m in parse(recipe)], [("w", p)], 1e-3)
    G = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    p.grad = G.clone()
    opt.step()
    with Allocations() as seen:
        opt.step()
    assert torch.equal(p.grad, G)
    assert 0 < seen.largest <= 4 * 2048 < p.numel()


@pytest.mark.parametrize("shape", [(6, 9), (7,)])
def test_gradients_of_the_floor_s_size_are_damped_by_it(shape):
    """1e-30 stands beside G^2, so a gradient of 1e-15 steps by 1 / sqrt(2) and not by 1."""
    W = torch.zeros(shape, dtype=torch.float64)
    p, _ = ours("full + adafactor", W, [torch.full(shape, 1e-15, dtype=torch.float64)], 1.0)
    torch.testing.assert_close(p.detach(), torch.full_like(W, -(0.5**0.5)), rtol=1e-9, atol=0)


def test_rows_of_the_floor_s_size_keep_the_floor_once():
    G = torch.full((4, 3), 1e-15, dtype=torch.float64) * torch.arange(1.0, 5.0)[:, None]
    W = torch.zeros(4, 3, dtype=torch.float64)
    p, _ = ours("full + adafactor(clip=100)", W, [G], 1.0)
    torch.testing.assert_close(p.detach(), reference(W, [G], 1.0, d=100.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7,)])
def test_what_is_kept_are_the_means_of_the_equations(shape):
    """The row means, the column means and, of a vector, V itself: what a checkpoint carries."""
    Gs = gradients(shape, 4)
    _, opt = ours("full + adafactor", torch.zeros(shape, dtype=torch.float64), Gs, 0.01)
    (state,) = opt.state.values()
    R = C = V = 0.0
    for t, G in enumerate(Gs, 1):
        b, S = 1 - t**-0.8, G**2 + 1e-30
        V = b * V + (1 - b) * S
        if len(shape) == 2:
            R, C = b * R + (1 - b) * S.mean(1), b * C + (1 - b) * S.mean(0)
    want = {"row": R, "col": C} if len(shape) == 2 else {"exp_avg_sq": V}
    for name, value in want.items():
        torch.testing.assert_close(state[name].view(value.shape), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size, factor", [(1e-5, 1e-3), (1.5e-3, 1.5e-3), (0.5, 0.5)])
def test_a_step_relative_to_the_weight_has_a_floor(size, factor):
    """Equal gradients are U = 1, so the step is lr max(1e-3, RMS(W))."""
    W = torch.full((6, 9), size, dtype=torch.float64)
    p, _ = ours("full + adafactor(scale_parameter=True)", W, [torch.ones_like(W)], 0.1)
    torch.testing.assert_close(W - p.detach(), torch.full_like(W, 0.1 * factor), rtol=1e-9,
                               atol=0)


def test_a_rank_one_square_is_reproduced_exactly():
    g = torch.Generator().manual_seed(0)
    G = torch.outer(torch.randn(6, generator=g, dtype=torch.float64),
                    torch.randn(9, generator=g, dtype=torch.float64))
    p, _ = ours("full + adafactor", torch.zeros(6, 9, dtype=torch.float64), [G], 1.0)
    torch.testing.assert_close(p.detach(), -G.sign(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta1, more", [(0.0, 0), (0.9, 1)])
def test_state_is_m_plus_n(beta1, more):
    W = torch.zeros(6, 9)
    _, opt = ours(f"full + adafactor(beta1={beta1})", W, [torch.ones(6, 9)] * 2, 0.1)
    (state,) = opt.state.values()
    held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))
    assert held == 4 * (6 + 9 + more * 54)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("shape, few", [((6, 9), 15), ((4, 3, 2, 2), 16), ((7,), 7), ((1, 5), 6)])
def test_the_bytes_it_tells_are_held(shape, few, beta1, dtype):
    """m + n of a matrix, every entry of a vector, one mean more with beta1; never below fp32."""
    recipe = f"full + adafactor(beta1={beta1})"
    want = (few + (math.prod(shape) if beta1 else 0)) * max(4, dtype.itemsize)
    assert parse(recipe)[1].state_bytes(shape, dtype.itemsize) == want
    _, opt = ours(recipe, torch.zeros(shape, dtype=dtype), [torch.ones(shape, dtype=dtype)], 0.1)
    (state,) = opt.state.values()
    assert sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor)) == want


def test_a_convolution_is_seen_as_out_by_rest():
    W = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    Gs = gradients((4, 3, 2, 2), 3)
    p, _ = ours("full + adafactor", W, Gs, 0.03)
    want = reference(W.flatten(1), [G.flatten(1) for G in Gs], 0.03)
    torch.testing.assert_close(p.detach().flatten(1), want, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_is_bit_for_bit_the_same():
    W, Gs = torch.zeros(6, 9, dtype=torch.float64), gradients((6, 9), 6)
    whole, _ = ours("full + adafactor(beta1=0.9)", W, Gs, 0.01)
    first, opt = ours("full + adafactor(beta1=0.9)", W, Gs[:3], 0.01)
    second = nn.Parameter(first.detach().clone())
    again = compose([m.optimizer() for m in parse("full + adafactor(beta1=0.9)")],
                    [("w", second)], 0.01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for G in Gs[3:]:
        second.grad = G.clone()
        again.step()
    assert torch.equal(whole, second)


def test_it_trains_and_steps_inside_backward_the_same():
    ends = []
    for extra in ("", " + step_in_backward"):
        net, batch = tiny("bert")
        net.eval()
        tuned = burnish.tune(net, f"full + adafactor{extra}", head=False)
        tuned.optimizer(lr=1e-3)
        losses = [float(tuned.step(batch)) for _ in range(4)]
        assert losses[-1] < losses[0]
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_subspace_under_it_is_refused():
    with pytest.raises(burnish.RecipeError, match="galore and adafactor cannot be joined.*adamw"):
        burnish.tune(tiny("bert")[0], "full + galore(rank=4) + adafactor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", [
    "adafactor", "adafactor(beta1=0.9)", "adafactor(scale_parameter=True, weight_decay=0.1)",
    "adafactor(beta1=0.9, scale_parameter=True, clip=0.5) + kahan",
    "adafactor + stochastic_rounding", "adafactor(scale_parameter=True) + master_weights"])
def test_small_tensors_side_by_side_are_each_by_itself_bit_for_bit(recipe, dtype, monkeypatch):
    shapes = [(8, 48), (48, 8), (40,), (3, 5, 2, 2), (8, 48), (7,), (1, 9)]
    runs, bunches, step = [], [], Composed._step_bunch
    monkeypatch.setattr(Composed, "_step_bunch", lambda self, group, found, *a: (
        bunches.append(len(found)), step(self, group, found, *a)))
    for together in (True, False):
        g = torch.Generator().manual_seed(3)
        named = [(f"t{i}", nn.Parameter(torch.randn(s, generator=g).to(dtype)))
                 for i, s in enumerate(shapes)]
        opt = compose([m.optimizer() for m in parse(recipe)], named, 1e-2, seed=4)
        if not together:
            monkeypatch.setattr(Composed, "_together", lambda self: set())
        for t in range(3):
            for i, (_, p) in enumerate(named):
                p.grad = None if (t, i) == (1, 4) else torch.randn(p.shape, generator=g).to(dtype)
            grads = [p.grad.clone() for _, p in named if p.grad is not None]
            opt.step()
            assert all(map(torch.equal, grads, (p.grad for _, p in named if p.grad is not None)))
        runs.append([p for _, p in named] + [
            v for _, p in named for _, v in sorted(opt.state[p].items())
            if isinstance(v, torch.Tensor)])
    assert max(bunches) == 5
    assert len(runs[0]) == len(runs[1]) and all(map(torch.equal, *runs))


def test_temporaries_of_many_small_tensors_are_a_strip_s(monkeypatch):
    size = 1 << 14
    monkeypatch.setattr(Composed, "_slice", staticmethod(lambda device: size))
    named = [(f"t{i}", nn.Parameter(torch.randn(64, 64))) for i in range(64)]
    opt = compose([m.optimizer() for m in parse("adafactor")], named, 1e-3)
    for _, p in named:
        p.grad = torch.randn(64, 64)
    opt.step()
    with Living() as seen:
        opt.step()
    assert 0 < seen.peak <= 2 * 4 * size < 64 * 4096 * 4
