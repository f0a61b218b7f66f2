"""Fira: GaLore and the rest of the gradient; against a dense fp64 reference from the equations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse
from burnish.testing.models import tiny

B1, B2, EPS = 0.9, 0.999, 1e-6


def gradients(m, n, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=torch.float64) * 10.0**(k % 3 - 1)
            for k in range(steps)]


def reference(W, Gs, rank, every, alpha, lr, literal=False, limit=1.01, residual=True,
              side="std"):
    """The equations of the paper, dense, in fp64; numpy-like torch, nothing of ours."""
    m, n = W.shape
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[side]
    M = V = last = P = Q = None
    norms = []
    for t, G in enumerate(Gs, 1):
        if (t - 1) % every == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P, Q = U[:, :rank], Vh[:rank]                       # largest entries positive
            P = P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
            Q = Q * Q.gather(1, Q.abs().argmax(1, keepdim=True)).sign()
        R = P.T @ G if left else G @ Q.T

        def back(X, P=P, Q=Q):
            return P @ X if left else X @ Q

        M = (1 - B1) * R if M is None else B1 * M + (1 - B1) * R
        V = (1 - B2) * R**2 if V is None else B2 * V + (1 - B2) * R**2
        N = M / (V.sqrt() + EPS)
        if left:
            phi = (N.norm(dim=0) / (R.norm(dim=0) + 1e-8))[None, :]
        else:
            phi = (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None]
        S = phi * (G - (alpha if literal else 1.0) * back(R))
        if last is not None and limit:
            S = S / (max(float(S.norm()) / (last + 1e-8), limit) / limit)
        last = float(S.norm())
        norms.append(last)
        eta = lr * math.sqrt(1 - B2**t) / (1 - B1**t)
        W = W - eta * (alpha * back(N) + (S if residual else 0.0))
    return W, norms


def ours(recipe, W, Gs, lr, each=lambda opt, p: None, **hyper):
    p = nn.Parameter(W.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("blocks.0.w", p)], lr, **hyper)
    for G in Gs:
        p.grad = G.clone()
        opt.step()
        each(opt, p)
    return p, opt


def start(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("m, n", [(12, 20), (20, 12), (12, 12)])
def test_steps_are_the_equations(m, n, literal):
    W, Gs = start(m, n), gradients(m, n, 7)
    p, _ = ours(f"full + fira(rank=3, every=3, scale=0.25, literal={literal})", W, Gs, 0.01)
    want, _ = reference(W, Gs, 3, 3, 0.25, 0.01, literal)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
def test_what_nobody_set_is_the_paper_s(m, n):
    """Alpha 0.25, limit 1.01, eps 1e-6, no decay, the orthogonal residual."""
    W, Gs = start(m, n), [g * 1e-4 for g in gradients(m, n, 5)]     # eps is seen
    p, _ = ours("full + fira(rank=3, every=3)", W, Gs, 0.01)
    want, _ = reference(W, Gs, 3, 3, 0.25, 0.01)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("limit", [0.0, 1.01, 1.1])
def test_growth_is_cut_to_the_limit_asked_for(limit):
    """Equal gradients, whose m / sqrt(v) grows by a third at the second step; 0 cuts nothing."""
    W, Gs = start(12, 20), gradients(12, 20, 1) * 4
    p, _ = ours(f"full + fira(rank=3, limit={limit})", W, Gs, 0.01)
    want, _ = reference(W, Gs, 3, 9, 0.25, 0.01, limit=limit)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right", "reverse_std"])
@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
def test_the_factor_sits_on_the_side_asked_for(m, n, side):
    W, Gs = start(m, n), gradients(m, n, 4)
    p, _ = ours(f"full + fira(rank=3, every=2, proj_type={side!r})", W, Gs, 0.01)
    want, _ = reference(W, Gs, 3, 2, 0.25, 0.01, side=side)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_bytes_it_tells_are_the_factor_and_two_moments(dtype):
    told, size = parse("fira(rank=4)")[0].state_bytes, dtype.itemsize
    assert told((12, 20), size) == 12 * 4 * size + 2 * 4 * 20 * max(4, size)
    assert told((7,), size) == 2 * 7 * max(4, size)                            # Adam's


def test_targets_choose_what_is_projected():
    ps = [(f"blocks.0.{n}", nn.Parameter(start(12, 20))) for n in ("w", "v")]
    opt = compose([m.optimizer() for m in parse("full + fira(rank=3, targets='v')")], ps, 0.01)
    for _, p in ps:
        p.grad = gradients(12, 20, 1)[0]
    opt.step()
    w, v = (opt.state[p]["exp_avg"].numel() for _, p in ps)
    assert (w, v) == (12 * 20, 3 * 20)


def test_full_rank_leaves_nothing_over_and_is_galore():
    W, Gs = start(8, 12), gradients(8, 12, 5)
    where = "targets='w'"
    a, _ = ours(f"full + fira(rank=8, every=2, {where})", W, Gs, 0.01)
    b, _ = ours(f"full + galore(rank=8, every=2, {where})", W, Gs, 0.01)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_residual_grows_by_at_most_one_percent():
    norms = []
    ours("full + fira(rank=3, every=3)", start(12, 20),
         [g * 3.0**k for k, g in enumerate(gradients(12, 20, 8))], 0.01,
         each=lambda opt, p: norms.append(float(opt.state[p]["residual_norm"])))
    assert all(b <= a * 1.01 * (1 + 1e-9) for a, b in zip(norms, norms[1:], strict=False))


def test_the_update_is_of_full_rank():
    W = torch.zeros(12, 20, dtype=torch.float64)
    p, _ = ours("full + fira(rank=2)", W, gradients(12, 20, 1), 0.01)
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == 12
    p, _ = ours("full + galore(rank=2)", W, gradients(12, 20, 1), 0.01)
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == 2


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
def test_state_is_that_of_galore_and_one_scalar(m, n):
    Gs = [g.float() for g in gradients(m, n, 2)]
    _, opt = ours("full + fira(rank=3)", torch.zeros(m, n), Gs, 0.01)
    (state,) = opt.state.values()
    held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))
    assert held == 4 * (12 * 3 + 2 * 20 * 3 + 1)


def test_a_resumed_run_is_bit_for_bit_the_same():
    W, Gs = start(12, 20), gradients(12, 20, 6)
    recipe = "full + fira(rank=3, every=2)"
    whole, _ = ours(recipe, W, Gs, 0.01)
    first, opt = ours(recipe, W, Gs[:3], 0.01)
    second = nn.Parameter(first.detach().clone())
    again = compose([m.optimizer() for m in parse(recipe)], [("blocks.0.w", second)], 0.01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for G in Gs[3:]:
        second.grad = G.clone()
        again.step()
    assert torch.equal(whole, second)


def test_with_eight_bit_moments_and_on_a_model():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "full + fira(rank=4) + adam8bit", head=False)
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_it_cannot_share_the_subspace():
    with pytest.raises(burnish.RecipeError, match="fira and galore|galore and fira"):
        parse("full + fira + galore")


def test_what_it_refuses_it_refuses_by_its_name():
    with pytest.raises(burnish.RecipeError, match="^fira: every is at least 1, got 0"):
        parse("full + fira(every=0)")[1].optimizer()


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("fira")
    want = {"rank": 128, "every": 200}
    assert {k: getattr(made, k) for k in want} == want
