"""GaLore against a dense fp64 reference, and the counts and claims of its paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.update.rules import SGD
from burnish.blocks.update.step import Inner, Subspace, block_matrices, compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse

F64 = torch.float64


def answers(recipe):
    return [part.optimizer() for part in parse(recipe)]


def gradients(m, n, steps, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=F64).to(dtype) for _ in range(steps)]


def run(spec, W, grads, lr, **kw):
    p = nn.Parameter(W.clone())
    opt = compose(spec, [("layers.0.mlp.weight", p)], lr, **kw)
    path = []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return path, opt, p


def reference(W, grads, lr, r, T, alpha, proj="std", wd=0.0, eps=1e-6):
    """The equations, dense, one line each."""
    m, n = W.shape
    W, M, V = W.clone(), 0.0, 0.0
    right = {"std": m >= n, "reverse_std": m < n, "left": False}.get(proj, True)
    left = proj == "full" or not right
    for t, G in enumerate(grads, 1):
        if (t - 1) % T == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)         # largest entries positive
            U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
            Vh = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
            P = U[:, :r] if left else torch.eye(m, dtype=F64)
            Q = Vh[:r] if right else torch.eye(n, dtype=F64)
        R = P.t() @ G @ Q.t()
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (V.sqrt() + eps)
        W = W - lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * alpha * (P @ N @ Q)
        W = W - lr * wd * W
    return W


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
@pytest.mark.parametrize("proj", ["std", "reverse_std", "left", "right", "full"])
def test_the_equations(m, n, proj):
    W, = gradients(m, n, 1, seed=1)
    grads = gradients(m, n, 7)
    spec = answers(f"galore(rank=3, every=3, scale=0.25, proj_type='{proj}')")
    path, _, _ = run(spec, W, grads, 1e-2, weight_decay=0.1)
    want = reference(W, grads, 1e-2, 3, 3, 0.25, proj, wd=0.1)
    torch.testing.assert_close(path[-1], want, rtol=1e-8, atol=1e-10)


def test_what_nobody_set_is_the_paper_s():
    """Alpha 0.25, eps 1e-6, betas 0.9 and 0.999, no decay."""
    W, = gradients(12, 20, 1, seed=1)
    grads = [g * 1e-4 for g in gradients(12, 20, 5)]                # eps is seen
    path, _, _ = run(answers("galore(rank=3)"), W, grads, 1e-2)
    torch.testing.assert_close(path[-1], reference(W, grads, 1e-2, 3, 200, 0.25), rtol=1e-8,
                               atol=1e-12)


def test_a_sketched_basis_is_orthonormal_and_nearly_as_good_as_the_exact_one():
    """On singular values that fall slowly the sketch (rank + 8 columns, two power iterations)
    finds another span than the exact decomposition, which holds nearly as much of G."""
    W, (G,) = torch.zeros(80, 120, dtype=F64), gradients(80, 120, 1)
    best = torch.linalg.svdvals(G)[:3].square().sum()
    held = {}
    for svd in ("exact", "randomized"):
        _, opt, p = run(answers(f"galore(rank=3, svd={svd!r})"), W, [G], 1e-2)
        P = opt.state[p]["projector.left"]
        torch.testing.assert_close(P.t() @ P, torch.eye(3, dtype=F64), rtol=0, atol=1e-10)
        held[svd] = float((P.t() @ G).square().sum() / best)
    assert held["exact"] == pytest.approx(1.0, rel=1e-10)
    assert 0.8 < held["randomized"] < 1 - 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_the_bytes_it_tells_are_the_factor_and_two_moments(dtype):
    told, size = parse("galore(rank=4)")[0].state_bytes, dtype.itemsize
    assert told((12, 20), size) == 12 * 4 * size + 2 * 4 * 20 * max(4, size)
    assert told((7,), size) == 2 * 7 * max(4, size)                            # Adam's


def test_targets_choose_what_is_projected():
    ps = [(f"layers.0.{n}", nn.Parameter(gradients(12, 20, 1)[0])) for n in ("w", "v")]
    opt = compose(answers("galore(rank=3, targets='v')"), ps, 1e-2)
    for _, p in ps:
        p.grad = gradients(12, 20, 1)[0]
    opt.step()
    w, v = (opt.state[p]["exp_avg"].numel() for _, p in ps)
    assert (w, v) == (12 * 20, 3 * 20)


@pytest.mark.parametrize("m, n", [(16, 24), (24, 16), (16, 16)])
def test_with_sgd_and_full_rank_it_is_sgd(m, n):
    W, = gradients(m, n, 1, seed=1, dtype=torch.float32)
    grads = gradients(m, n, 8, dtype=torch.float32)
    whole = Subspace(map=SubspaceMap(rank=min(m, n)), every=3, where=lambda name, p: True)
    path, _, _ = run([whole, SGD()], W, grads, 0.1)
    torch.testing.assert_close(path[-1], W - 0.1 * sum(grads), rtol=1e-5, atol=1e-5)


def test_the_change_has_rank_r_per_period():
    r, T = 3, 4
    W, = gradients(20, 32, 1, seed=1)
    path, _, _ = run(answers(f"galore(rank={r}, every={T})"), W, gradients(20, 32, 3 * T),
                     1e-2)
    for step, W_t in enumerate(path):
        assert torch.linalg.matrix_rank(W_t - W, atol=1e-10) <= r * (step // T + 1)
    assert torch.linalg.matrix_rank(path[-1] - W, atol=1e-10) > r


@pytest.mark.parametrize("m, n, r", [(40, 64, 8), (64, 40, 8), (40, 40, 5)])
def test_state_elements(m, n, r):
    a, c = min(m, n), max(m, n)
    W, = gradients(m, n, 1)
    count = {}
    for proj in ("std", "reverse_std", "full"):
        _, opt, p = run(answers(f"galore(rank={r}, proj_type='{proj}')"), W,
                        gradients(m, n, 2), 1e-2)
        count[proj] = sum(v.numel() for v in opt.state[p].values() if isinstance(v, torch.Tensor))
    assert count == {"std": a * r + 2 * c * r, "reverse_std": c * r + 2 * a * r,
                     "full": r * (m + n) + 2 * r * r}


def test_eight_bit_state_bytes():
    m, n, r = 256, 512, 64
    W, = gradients(m, n, 1, dtype=torch.bfloat16)
    _, opt, p = run(answers(f"galore(rank={r}) + adam8bit"), W,
                    gradients(m, n, 1, dtype=torch.bfloat16), 1e-2)
    held = sum(v.nbytes for v in opt.state[p].values() if isinstance(v, torch.Tensor))
    assert held == 2 * m * r + 2 * n * r * (1 + 4 / 256)


def test_moments_stay_and_time_goes_on_when_the_basis_changes():
    W, = gradients(10, 14, 1, seed=1)
    grads = gradients(10, 14, 4)
    _, opt, p = run(answers("galore(rank=3, every=2)"), W, grads[:2], 1e-2)
    P, M = opt.state[p]["projector.left"].clone(), opt.state[p]["exp_avg"].clone()
    p.grad = grads[2].clone()
    opt.step()
    new = opt.state[p]
    assert not torch.equal(P, new["projector.left"]) and new["step"] == 3
    torch.testing.assert_close(new["exp_avg"], 0.9 * M + 0.1 * new["projector.left"].t() @ grads[2])


@pytest.mark.parametrize("how", ["reset", "rotate"])
def test_moments_may_be_reset_or_rotated(how):
    W, = gradients(10, 14, 1, seed=1)
    grads = gradients(10, 14, 3)
    _, opt, p = run(answers(f"galore(rank=10, every=2, at_refresh='{how}', "
                            "targets='mlp')"), W, grads[:2], 1e-2)
    full = opt.state[p]["projector.left"] @ opt.state[p]["exp_avg"]
    p.grad = grads[2].clone()
    opt.step()
    P = opt.state[p]["projector.left"]
    carried = 0.9 * full if how == "rotate" else 0.0
    torch.testing.assert_close(P @ opt.state[p]["exp_avg"], carried + 0.1 * grads[2])


def test_folded_micro_batches_equal_accumulate_then_project():
    """Against the dense sum: P from the first micro-batch's gradient, R summed over all four."""
    m, n, r, k = 12, 18, 4, 4
    W, = gradients(m, n, 1, seed=1)
    grads = gradients(m, n, 5 * k)
    p = nn.Parameter(W.clone())
    opt = compose(answers(f"galore(rank={r}, every=2, scale=1.0, in_backward=True)"),
                  [("layers.0.mlp.weight", p)], 1e-2, accumulation=k)
    want, M, V = W.clone(), 0.0, 0.0
    for t in range(1, 6):
        micro = grads[(t - 1) * k : t * k]
        for g in micro:
            (p * g).sum().backward()
        opt.step()
        if (t - 1) % 2 == 0:
            P = torch.linalg.svd(micro[0], full_matrices=False)[0][:, :r]
            P = P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign()   # the largest is positive
        R = P.t() @ sum(micro)
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        step = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * M / (V.sqrt() + 1e-6)
        want = want - 1e-2 * P @ step
        torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-8)


def test_bf16_weights_receive_the_fp32_sum_rounded_once():
    W, = gradients(24, 40, 1, seed=1, dtype=torch.bfloat16)
    grads = gradients(24, 40, 1, dtype=torch.bfloat16)
    path, opt, p = run(answers("galore(rank=4, scale=1.0)"), W, grads, 1e-2, weight_decay=0.5)
    P = opt.state[p]["projector.left"].double()
    R = P.t() @ grads[0].double()
    exact = W.double() - 1e-2 * P @ (R / (R.abs() + 1e-6 / 0.001**0.5))
    exact = exact * (1 - 1e-2 * 0.5)
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((path[0].double() - exact).abs() <= spacing * 0.51).all()


@pytest.mark.parametrize("name, shape, projected", [
    ("model.layers.3.self_attn.q_proj.weight", (64, 64), True),
    ("h.0.mlp.c_fc.weight", (64, 256), True),
    ("encoder.stages.1.blocks.0.conv.weight", (64, 64, 3, 3), True),
    ("model.layers.3.self_attn.q_proj.weight", (64, 8), False),      # nothing to save
    ("model.layers.3.input_layernorm.weight", (64,), False),
    ("model.embed_tokens.weight", (1000, 64), False),
    ("transformer.wte.weight", (1000, 64), False),
    ("lm_head.weight", (1000, 64), False),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 16), False),
])
def test_what_is_projected(name, shape, projected):
    assert block_matrices(8)(name, torch.empty(shape)) == projected


def test_the_rest_takes_the_same_rule_directly():
    p = nn.Parameter(torch.ones(6, dtype=F64))
    opt = compose(answers("galore(rank=4)"), [("layers.0.norm.weight", p)], 1e-2)
    p.grad = torch.full_like(p, 1e-4)
    opt.step()
    u = 0.001**0.5 / 0.1 * (0.1 * 1e-4) / ((0.001 * 1e-8) ** 0.5 + 1e-6)   # eps before correction
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 1e-2 * u))


RESIDUALS = {"sgd": lambda R, phi: R, "sign": lambda R, phi: R.sign(),
             "scaled": lambda R, phi: phi * R}


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("m, n", [(10, 16), (16, 10)])
def test_residual_rules(kind, m, n):
    """What lies outside the subspace: plain, its sign, or scaled per channel of the long side."""
    W, = gradients(m, n, 1, seed=1)
    grads = gradients(m, n, 3)
    spec = Subspace(map=SubspaceMap(rank=3), every=9, residual=kind, residual_scale=0.5,
                    where=lambda name, p: True)
    path, opt, p = run([spec, Inner(rule=SGD(momentum=0.5))], W, grads, 0.1)
    basis = opt.state[p]
    want, b, norm = W.clone(), 0.0, None
    for G in grads:
        if m < n:
            P = basis["projector.left"]
            R, back = P.t() @ G, lambda N, P=P: P @ N
        else:
            Q = basis["projector.right"]
            R, back = G @ Q.t(), lambda N, Q=Q: N @ Q
        b = 0.5 * b + R
        axis = 0 if m < n else 1
        phi = (b.norm(dim=axis) / (R.norm(dim=axis) + 1e-8)).unsqueeze(axis)
        S = RESIDUALS[kind](G - back(R), phi)
        if kind == "scaled":
            if norm is not None:
                S = S / (max(S.norm() / (norm + 1e-8), 1.01) / 1.01)
                assert S.norm() <= 1.01 * (norm + 1e-8) * (1 + 1e-12)
            norm = S.norm()
        want = want - 0.1 * (back(b) + 0.5 * S)
    torch.testing.assert_close(path[-1], want, rtol=1e-8, atol=1e-9)


def test_full_rank_leaves_no_residual():
    W, = gradients(8, 12, 1, seed=1)
    grads = gradients(8, 12, 4)
    ends = [run([Subspace(map=SubspaceMap(rank=8), residual=kind, where=lambda n, p: True)],
                W, grads, 1e-2)[0][-1] for kind in ("none", "scaled")]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


def test_columns_with_sign_descent_partition_the_tensor():
    W, = gradients(8, 12, 1, seed=1)
    grads = gradients(8, 12, 1)
    spec = Subspace(map=SubspaceMap(rank=5, kind="columns"), residual="sign",
                    where=lambda n, p: True)
    path, opt, p = run([spec, SGD()], W, grads, 0.1)
    idx = opt.state[p]["projector.columns"].long()
    inside = torch.zeros(12, dtype=torch.bool)
    inside[idx] = True
    torch.testing.assert_close(path[0], W - 0.1 * torch.where(inside, grads[0], grads[0].sign()))


def test_conv_weights_are_out_by_rest():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, bias=False).double()
    flat = nn.Parameter(conv.weight.detach().flatten(1).clone())
    spec = answers("galore(rank=4, targets='*')")
    a = compose(spec, [("0.weight", conv.weight)], 1e-2)
    b = compose(spec, [("0.weight", flat)], 1e-2)
    for g in gradients(16, 72, 3):
        conv.weight.grad, flat.grad = g.view(16, 8, 3, 3).clone(), g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(conv.weight.detach().flatten(1), flat.detach())


def test_it_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                          nn.Linear(64, 1))
    x = torch.randn(128, 20)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    opt = compose(answers("galore(rank=8, every=20, scale=1.0)"), model.named_parameters(),
                  5e-3)
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_state_of_a_7b_model():
    """LLaMA-7B, rank 1024, 8-bit moments, bf16 factors: 5.70 GB of state; with the weights 17.9
    GiB (the paper: about 18G). One block on fake tensors, times 32, and the dense rest."""
    D, F, V = 4096, 11008, 32000
    with FakeTensorMode():
        def weight(*shape):
            p = nn.Parameter(torch.empty(*shape, dtype=torch.bfloat16))
            p.grad = torch.empty_like(p)
            return p

        block = [(f"layers.0.{i}.weight", weight(*s))
                 for i, s in enumerate([(D, D)] * 4 + [(F, D)] * 2 + [(D, F)])]
        block += [(f"layers.0.norm{i}.weight", weight(D)) for i in range(2)]
        rest = [("embed_tokens.weight", weight(V, D)), ("lm_head.weight", weight(V, D)),
                ("norm.weight", weight(D))]
        opt = compose(answers("galore(rank=1024) + adam8bit"), block + rest, 1e-3)
        opt.step()

        def held(named):
            return sum(v.nbytes for _, p in named for v in opt.state[p].values()
                       if isinstance(v, torch.Tensor))

        state = 32 * held(block) + held(rest)
        weights = 2 * (32 * sum(p.numel() for _, p in block) + sum(p.numel() for _, p in rest))
    assert weights == 2 * 6_738_415_616
    assert state == pytest.approx(5.70e9, rel=0.002)
    assert (weights + state) / 2**30 == pytest.approx(17.86, abs=0.01)


def test_what_it_refuses_it_refuses_by_its_name():
    with pytest.raises(RecipeError, match="^galore: every is at least 1, got 0"):
        answers("galore(every=0)")


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("galore")
    want = {"rank": 128, "every": 200, "scale": 0.25, "in_backward": False}
    assert {k: getattr(made, k) for k in want} == want
