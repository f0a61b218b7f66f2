"""APOLLO: the gradient at rates found in a random projection; against a dense fp64 reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.step import compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing.models import tiny

B1, B2, EPS = 0.9, 0.999, 1e-6


def gradients(m, n, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=torch.float64) * 10.0**(k % 3 - 1)
            for k in range(steps)]


def projection(m, n, rank, turn):
    """The drawn P of period `turn`: an input of the equation, not a part of it."""
    map_ = SubspaceMap(rank=rank, kind="gaussian")
    basis = map_.basis(torch.zeros(m, n, dtype=torch.float64),
                       CounterNoise(0, "blocks.0.w/subspace"), turn, torch.float64)
    return basis.left, basis.right


def reference(W, Gs, rank, every, scale, by, front, lr, wd=0.0, limit=1.01):
    """The equations of the paper, dense, in fp64: no panels, no classes."""
    m, n = W.shape
    M = V = None
    last = None
    for t, G in enumerate(Gs, 1):
        P, Q = projection(m, n, rank, (t - 1) // every)
        R = P.T @ G if m < n else G @ Q.T                       # P on the short side
        M = (1 - B1) * R if M is None else B1 * M + (1 - B1) * R
        V = (1 - B2) * R**2 if V is None else B2 * V + (1 - B2) * R**2
        N = M / (V.sqrt() + EPS)
        if by == "tensor":
            U = G * (N.norm() / (R.norm() + 1e-8))
        elif m < n:
            U = G * (N.norm(dim=0) / (R.norm(dim=0) + 1e-8))
        else:
            U = G * (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None]
        if front:
            U = U * math.sqrt(scale)
        if last is not None and limit:
            U = U / (max(float(U.norm()) / (float(last) + 1e-8), limit) / limit)
        last = U.norm()
        if not front:
            U = U * math.sqrt(scale)
        W = W - lr * math.sqrt(1 - B2**t) / (1 - B1**t) * U
        W = W - lr * wd * W
    return W


def ours(recipe, W, Gs, lr, **hyper):
    p = nn.Parameter(W.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("blocks.0.w", p)], lr, **hyper)
    for G in Gs:
        p.grad = G.clone()
        opt.step()
    return p, opt


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("settings", [
    {"rank": 3, "scale": 1.0, "by": "channel"}, {"rank": 1, "scale": 128.0, "by": "tensor"},
    {"rank": 3, "scale": 4.0, "by": "channel", "scale_front": True}])
def test_steps_are_the_equations(m, n, settings):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    Gs = gradients(m, n, 7)
    text = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    p, _ = ours(f"full + apollo(every=3, {text})", W, Gs, 0.01, weight_decay=0.1)
    want = reference(W, Gs, settings["rank"], 3, settings["scale"], settings["by"],
                     settings.get("scale_front", False), 0.01, 0.1)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("every", [2, 3])
def test_what_nobody_set_is_the_paper_s(every):
    """Scale 1, channels, limit 1.01, betas 0.9 and 0.999, eps 1e-6, no decay."""
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    Gs = [g * 1e-4 for g in gradients(12, 20, 7)]               # small enough for eps to be seen
    p, _ = ours(f"full + apollo(rank=3, every={every})", W, Gs, 0.01)
    want = reference(W, Gs, 3, every, 1.0, "channel", False, 0.01)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("limit", [0.0, 1.01, 1.1])
def test_growth_is_cut_to_the_limit_asked_for(limit):
    """Equal gradients, whose m / sqrt(v) grows by a third at the second step; 0 cuts nothing."""
    W, Gs = torch.zeros(12, 20, dtype=torch.float64), gradients(12, 20, 1) * 4
    p, _ = ours(f"full + apollo(rank=3, limit={limit})", W, Gs, 0.01)
    want = reference(W, Gs, 3, 9, 1.0, "channel", False, 0.01, limit=limit)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("front", [False, True])
def test_where_the_scale_stands_is_seen_beside_the_limiter_s_floor(front):
    """A factor commutes with the limiter but for the 1e-8 beside the last norm: below it, the two
    orders take different steps, each its own equation's."""
    W = torch.zeros(12, 20, dtype=torch.float64)
    Gs = [g * 1e-11 * 2.0**k for k, g in enumerate(gradients(12, 20, 1) * 4)]
    p, _ = ours(f"full + apollo(rank=3, scale=1e4, scale_front={front})", W, Gs, 0.01)
    want, other = (reference(W, Gs, 3, 9, 1e4, "channel", f, 0.01) for f in (front, not front))
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=0)
    assert (want - other).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("side", ["left", "right", "reverse_std"])
@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
def test_the_moments_lie_on_the_side_asked_for(m, n, side):
    """P on the left leaves (r, n), on the right (m, r), reversed the short side."""
    _, opt = ours(f"full + apollo(rank=3, proj_type={side!r})",
                  torch.zeros(m, n, dtype=torch.float64), gradients(m, n, 1), 0.01)
    (state,) = opt.state.values()
    want = {"left": 3 * n, "right": 3 * m, "reverse_std": 3 * min(m, n)}[side]
    assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_bytes_it_tells_are_two_moments_of_the_image(dtype):
    told = parse("apollo(rank=4)")[0].state_bytes
    assert told((12, 20), dtype.itemsize) == 2 * 4 * 20 * max(4, dtype.itemsize)
    assert told((20, 12), dtype.itemsize) == 2 * 4 * 20 * max(4, dtype.itemsize)
    assert told((7,), dtype.itemsize) == 2 * 7 * max(4, dtype.itemsize)        # Adam's


def test_targets_choose_what_is_projected():
    ps = [(f"blocks.0.{n}", nn.Parameter(torch.zeros(12, 20, dtype=torch.float64)))
          for n in ("w", "v")]
    opt = compose([m.optimizer() for m in parse("full + apollo(rank=3, targets='v')")], ps, 0.01)
    for _, p in ps:
        p.grad = gradients(12, 20, 1)[0]
    opt.step()
    w, v = (opt.state[p]["exp_avg"].numel() for _, p in ps)
    assert (w, v) == (12 * 20, 3 * 20)


def test_it_cannot_share_the_subspace():
    with pytest.raises(burnish.RecipeError, match="apollo and galore|galore and apollo"):
        parse("full + apollo + galore")


def test_the_update_has_the_rank_of_the_gradient():
    g = torch.Generator().manual_seed(0)
    G = torch.randn(16, 2, generator=g, dtype=torch.float64) @ \
        torch.randn(2, 24, generator=g, dtype=torch.float64)
    W = torch.zeros(16, 24, dtype=torch.float64)
    p, _ = ours("full + apollo(rank=4, by='tensor')", W, [G], 0.1)
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == 2
    full = torch.randn(16, 24, generator=g, dtype=torch.float64)
    p, _ = ours("full + apollo(rank=4)", W, [full], 0.1)
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == 16


@pytest.mark.parametrize("rank", [1, 4])
def test_state_is_two_c_r_and_one_scalar(rank):
    W = torch.zeros(12, 20)
    _, opt = ours(f"full + apollo(rank={rank})", W, [g.float() for g in gradients(12, 20, 2)], 0.1)
    (state,) = opt.state.values()
    held = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert sum(v.nbytes for v in held.values()) == 4 * (2 * 20 * rank + 1)


def test_mini_on_a_seven_billion_llama():
    """2 sum(c) = 2 * 32 (4 * 4096 + 3 * 11008) = 3.16 M elements for the projected part."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32}
    anatomy = Anatomy.of(tiny("llama", meta=True, **config)[0])
    spec = parse("full + apollo(rank=1, scale=128.0, by='tensor')")[1].optimizer()
    total = sum(2 * math.prod(spec.map.shape(p.out, p.inp)) for p in anatomy.places
                if p.block is not None)
    assert total == 2 * 32 * (4 * 4096 + 3 * 11008) == 3_162_112


def test_the_order_of_parameters_changes_nothing():
    ends = []
    for order in (1, -1):
        torch.manual_seed(0)
        ps = [(f"blocks.{k}.w", nn.Parameter(torch.randn(8, 10))) for k in range(3)]
        opt = compose([m.optimizer() for m in parse("full + apollo(rank=2)")], ps[::order], 0.01)
        for k in range(4):
            for i, (_, p) in enumerate(ps):
                p.grad = torch.randn(8, 10, generator=torch.Generator().manual_seed(10 * k + i))
            opt.step()
        ends.append([p.detach().clone() for _, p in ps])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_not_poison_the_limiter(bad):
    Gs = gradients(8, 10, 4)
    p = nn.Parameter(torch.zeros(8, 10, dtype=torch.float64))
    opt = compose([m.optimizer() for m in parse("full + apollo(rank=2)")], [("blocks.0.w", p)], 0.1)
    p.grad = Gs[0]
    opt.step()
    kept = opt.state[p]["residual_norm"].clone()
    p.grad = torch.full_like(Gs[1], bad)
    opt.step()
    assert torch.equal(opt.state[p]["residual_norm"], kept)


def test_a_resumed_run_is_bit_for_bit_the_same():
    Gs = gradients(12, 20, 6)
    W = torch.zeros(12, 20, dtype=torch.float64)
    whole, _ = ours("full + apollo(rank=3, every=2)", W, Gs, 0.01)
    first, opt = ours("full + apollo(rank=3, every=2)", W, Gs[:3], 0.01)
    second = nn.Parameter(first.detach().clone())
    again = compose([m.optimizer() for m in parse("full + apollo(rank=3, every=2)")],
                    [("blocks.0.w", second)], 0.01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for G in Gs[3:]:
        second.grad = G.clone()
        again.step()
    assert torch.equal(whole, second)


def test_a_model_learns_and_says_what_was_projected():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "full + apollo(rank=4)")
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert any(n.startswith("apollo projects 14 of ") for n in tuned.summary()["notes"])


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("apollo")
    want = {"rank": 256, "every": 200, "scale_front": False}
    assert {k: getattr(made, k) for k in want} == want
