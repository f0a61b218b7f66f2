"""Natural GaLore against a dense fp64 reference: F made in full and solved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.natural import Natural
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64 = torch.float64


def gradients(m, n, steps, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=F64).to(dtype) for _ in range(steps)]


def drive(recipe, W, grads, lr=1e-2, **kw):
    p = nn.Parameter(W.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("layers.0.w", p)], lr, **kw)
    for g in grads:
        p.grad = g.clone()
        opt.step()
    return p, opt


def reference(W, grads, lr, r, T, alpha, h=20, damping=1e-3, relative=False, keep=False,
              proj="std", wd=0.01):
    """The equations, dense: F is a k x k matrix."""
    m, n = W.shape
    W, M, V, past = W.clone(), 0.0, 0.0, []
    right = proj == "full" or m >= n
    left = proj == "full" or not right
    for t, G in enumerate(grads, 1):
        if (t - 1) % T == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)         # largest entries positive
            U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
            Vh = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
            P = U[:, :r] if left else torch.eye(m, dtype=F64)
            Q = Vh[:r] if right else torch.eye(n, dtype=F64)
            past = past if keep else []
        R = P.t() @ G @ Q.t()
        g = R.flatten()
        past = [*past, g][-h:]
        lam = damping * (sum(x @ x for x in past) / len(past) if relative else 1.0)
        F = lam * torch.eye(len(g), dtype=F64) + sum(torch.outer(x, x) for x in past)
        R = torch.linalg.solve(F, g).view_as(R)
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (V.sqrt() + 1e-6)
        W = W - lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * alpha * (P @ N @ Q)
        W = W - lr * wd * W
    return W


@pytest.mark.parametrize("settings, words", [
    ("", {}), (", history=2", {"h": 2}), (", damping=0.7", {"damping": 0.7}),
    (", damping=0.3, relative=True", {"damping": 0.3, "relative": True}),
    (", history_on_refresh='keep', history=3", {"keep": True, "h": 3}),
    (", proj_type='full'", {"proj": "full"})], ids=str)
@pytest.mark.parametrize("m, n", [(10, 14), (14, 10)])
def test_the_equations(m, n, settings, words):
    W, = gradients(m, n, 1, seed=1)
    grads = gradients(m, n, 9)
    p, _ = drive(f"full + natural_galore(rank=3, every=4, scale=0.5{settings})", W, grads)
    want = reference(W, grads, 1e-2, 3, 4, 0.5, **words)
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-9)


def test_one_gradient_is_divided_by_its_square():
    (R,) = gradients(3, 5, 1)
    made = Natural(length=7, damping=0.2).apply(R, {}, 1, 1)
    torch.testing.assert_close(made, R / (0.2 + R.square().sum()), rtol=1e-12, atol=0)


def test_a_history_of_one_forgets_all_but_this():
    for_all, state = Natural(length=1, damping=0.2), {}
    for t, R in enumerate(gradients(3, 5, 3), 1):
        want = R / (0.2 + R.square().sum())
        torch.testing.assert_close(for_all.apply(R, state, t, t), want, rtol=1e-12, atol=0)
    assert not for_all.keep


def test_in_fp32_it_is_near_the_dense_solution():
    """Gradients of unit scale and a small lambda, where Woodbury's form would lose its digits."""
    state, how, past = {}, Natural(length=4, damping=1e-3), []
    for t, R in enumerate(gradients(6, 8, 6, seed=3), 1):
        made = how.apply(R.float(), state, t, t)
        past = [*past, R.float().double().flatten()][-4:]
        F = 1e-3 * torch.eye(48, dtype=F64) + sum(torch.outer(x, x) for x in past)
        want = torch.linalg.solve(F, past[-1])
        assert (made.double().flatten() - want).norm() <= 1e-5 * want.norm()


def test_equal_gradients_stay_finite():
    """H^T H is singular, and lambda far below what rounding leaves of it: how far the step turns
    is rounding's, but it goes down."""
    state, how = {}, Natural(length=5, damping=1e-12)
    R = gradients(6, 8, 1)[0].float() * 1e3
    for t in range(1, 8):
        made = how.apply(R, state, t, t)
        cosine = (made * R).sum() / made.norm() / R.norm()
        assert torch.isfinite(made).all() and cosine > 0


def test_zero_gradients_move_nothing():
    p, _ = drive("full + natural_galore(rank=3)", torch.ones(8, 6), [torch.zeros(8, 6)] * 3,
                 weight_decay=0.0)
    assert torch.equal(p.detach(), torch.ones(8, 6))


@pytest.mark.parametrize("proj, more", [("std", 4 * 20 * 3 + 16), ("full", 4 * 9 + 16)])
def test_the_memory_is_the_formula(proj, more):
    a, c, r = 12, 20, 3
    _, opt = drive(f"full + natural_galore(rank=3, history=4, proj_type={proj!r})",
                   torch.ones(a, c), [g.float() for g in gradients(a, c, 2)])
    (state,) = opt.state.values()
    held = sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor))
    galore = a * r + 2 * c * r if proj == "std" else r * (a + c) + 2 * r * r
    assert held == galore + more
    told = parse(f"natural_galore(rank=3, history=4, proj_type={proj!r})")[0].state_bytes
    assert told((a, c), 4) == 4 * held and told((7,), 4) == 2 * 7 * 4


def test_a_resumed_run_is_bit_for_bit_the_same():
    W, grads = gradients(12, 20, 1, seed=1)[0], gradients(12, 20, 7)
    recipe = "full + natural_galore(rank=3, every=4, history=2)"
    whole, _ = drive(recipe, W, grads)
    first, opt = drive(recipe, W, grads[:3])
    second = nn.Parameter(first.detach().clone())
    again = compose([m.optimizer() for m in parse(recipe)], [("layers.0.w", second)], 1e-2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for G in grads[3:]:
        second.grad = G.clone()
        again.step()
    assert torch.equal(whole, second)


def test_folded_micro_batches_are_one_gradient():
    """Inside backward R adds up over micro-batches; what is remembered is the sum."""
    W, grads = gradients(12, 18, 1, seed=1)[0], gradients(12, 18, 6)
    p = nn.Parameter(W.clone())
    recipe = "full + natural_galore(rank=4) + step_in_backward"
    opt = compose([m.optimizer() for m in parse(recipe)], [("layers.0.w", p)], 1e-2, accumulation=2)
    for k in range(3):
        for g in grads[2 * k : 2 * k + 2]:
            (p * g).sum().backward()
        opt.step()
    history = opt.state[p]["projector.history"]
    P = opt.state[p]["projector.left"]
    for k in range(3):
        torch.testing.assert_close(history[k], P.t() @ (grads[2 * k] + grads[2 * k + 1]))


def test_targets_choose_what_is_projected():
    ps = [(f"layers.0.{n}", nn.Parameter(gradients(12, 20, 1)[0])) for n in ("w", "v")]
    opt = compose([m.optimizer() for m in parse("full + natural_galore(rank=3, targets='v')")], ps,
                  1e-2)
    for _, p in ps:
        p.grad = gradients(12, 20, 1)[0]
    opt.step()
    assert [opt.state[p]["exp_avg"].numel() for _, p in ps] == [12 * 20, 3 * 20]


def test_on_a_model_it_learns():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "full + natural_galore(rank=4, history=4) + adam8bit", head=False)
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_what_cannot_act_is_refused():
    for settings in ("history=0", "damping=0.0"):
        with pytest.raises(burnish.RecipeError, match="natural_galore: history is at least 1"):
            parse(f"full + natural_galore({settings})")[1].optimizer()
    with pytest.raises(burnish.RecipeError, match="^natural_galore: every is at least 1"):
        parse("full + natural_galore(every=0)")[1].optimizer()
    with pytest.raises(burnish.RecipeError, match="cannot be joined"):
        parse("full + natural_galore + galore")


def test_its_settings_are_the_authors():
    (made,) = parse("natural_galore")
    want = {"rank": 128, "every": 200, "scale": 0.25, "history": 20, "damping": 1e-3}
    assert {k: getattr(made, k) for k in want} == want
