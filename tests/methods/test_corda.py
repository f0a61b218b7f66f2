"""CorDA against its equations in plain float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError
from burnish.core.site import Place
from burnish.methods.delta.start.corda import damped, oriented
from burnish.testing.models import tiny


def covariance(seed=0, n=64, width=10):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, width, generator=g, dtype=torch.float64) \
        * torch.logspace(0, -1, width, dtype=torch.float64)
    return X.t() @ X / n


@pytest.mark.parametrize("smallest", [True, False])
def test_the_factors_are_the_chosen_part_of_the_oriented_svd(smallest):
    W, C, s, rank = torch.randn(7, 10, dtype=torch.float64), covariance(), 2.5, 3
    A, B = oriented(W, C, rank, smallest, s)
    D, inverse = damped(C)
    U, S, Vt = torch.linalg.svd(W @ D, full_matrices=False)
    torch.testing.assert_close(U @ torch.diag(S) @ Vt @ inverse, W, rtol=1e-3, atol=1e-6)
    J = list(range(S.numel() - rank, S.numel())) if smallest else list(range(rank))
    want = U[:, J] @ torch.diag(S[J]) @ Vt[J]
    torch.testing.assert_close(s * B @ A @ D, want, rtol=1e-8, atol=1e-9)
    norm = torch.linalg.matrix_norm(s * B @ A @ D)
    others = torch.combinations(torch.arange(S.numel()), rank)
    norms = torch.stack([S[o].square().sum().sqrt() for o in others])
    assert norm == pytest.approx(float(norms.min() if smallest else norms.max()), rel=1e-8)
    torch.testing.assert_close(B.t() @ B, torch.diag(S[J]) / s, rtol=1e-8, atol=1e-10)


def test_damping_doubles_until_the_inverse_holds():
    C = covariance()
    D, inverse = damped(C)
    torch.testing.assert_close(D, C + 0.01 * C.diagonal().mean() * torch.eye(10))
    low = torch.zeros(4, 4)                          # rank one in fp32: 0.01 does not suffice
    low[0, 0] = 1.0
    E, inverse = damped(low * 1e-3, start=1e-9)
    assert torch.linalg.matrix_norm(E @ inverse - torch.eye(4)) < 0.05
    with pytest.raises(CheckError, match="no inverse"):
        damped(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_the_whole_method_on_a_linear(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 7)).double()
    data = [-torch.rand(4, 5, 10, dtype=torch.float64) for _ in range(3)]    # max(X) < 0
    W, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    x = torch.randn(6, 10, dtype=torch.float64)
    tuned = burnish.tune(net, f"corda(rank=3, alpha=6, mode='{mode}')", targets="0", head=False,
                         calibration=data)
    torch.testing.assert_close(net(x), x @ W.t() + bias, rtol=1e-12, atol=1e-12)
    C = torch.zeros(10, 10, dtype=torch.float64)
    for X in torch.cat(data):
        X = X / X.abs().max()
        C += X.t() @ X / 12
    term = net[0].burnish.default["corda"]
    A0, B0 = term.A.detach().clone(), term.B.detach().clone()
    U, S, Vt = torch.linalg.svd(W @ damped(C)[0], full_matrices=False)
    J = slice(4, 7) if mode == "knowledge" else slice(0, 3)
    want = U[:, J] @ torch.diag(S[J]) @ Vt[J]
    torch.testing.assert_close(2 * B0 @ A0 @ damped(C)[0], want, rtol=1e-7, atol=1e-8)
    # the equation W' = W + s (B A - B0 A0) after both factors have moved
    A = (A0 + 0.1 * torch.randn_like(A0)).requires_grad_()
    B = (B0 + 0.1 * torch.randn_like(B0)).requires_grad_()
    with torch.no_grad():
        term.A.copy_(A)
        term.B.copy_(B)
    y, ref = net(x), x @ (W + 2 * (B @ A - B0 @ A0)).t() + bias
    torch.testing.assert_close(y, ref, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(y)
    y.backward(g)
    ref.backward(g)
    torch.testing.assert_close(term.A.grad, A.grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(term.B.grad, B.grad, rtol=1e-8, atol=1e-11)
    assert torch.allclose(tuned.merge()[0].weight, W + 2 * (B @ A - B0 @ A0))


def test_padding_changes_nothing():
    terms = []
    for padded in (False, True):
        net, batch = tiny("bert")
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        given = {"input_ids": ids, "attention_mask": mask}
        if padded:
            given = {"input_ids": torch.cat([ids, torch.full_like(ids, 3)], 1),
                     "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1)}
        tuned = burnish.tune(net, "corda(rank=4)", targets="q", head=False, calibration=[given])
        terms.append([t.B @ t.A for _, t in tuned.terms(nn.Module)])
    for a, b in zip(*terms, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_load_needs_no_data_and_a_tune_does(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "corda(rank=4)", calibration=[batch])
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    with pytest.raises(ConfigError, match="calibration"):
        burnish.tune(tiny("llama")[0], "corda(rank=4)")


def test_the_count_on_llama():
    method = burnish.parse("corda(rank=128)")[0]
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert 32 * sum(method.count(Place("x", "weight", "linear", o, i))
                    for o, i in shapes) == 319_815_680


def test_defaults_are_the_published_ones():
    assert burnish.parse("corda")[0].settings() == {
        "targets": None, "rank": 128, "alpha": None, "mode": "instruction", "samples": 256}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "corda(rank=3)", targets="0", head=False,
                         calibration=[torch.randn(4, 16)])
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


def test_what_a_token_keeps_besides_the_input():
    place = Place("l", "weight", "linear", 24, 16)
    assert burnish.parse("corda(rank=5)")[0].per_token(place) == 5


@pytest.mark.parametrize("settings", ["samples=1"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"corda({settings})")


@pytest.mark.parametrize("settings", ["samples=0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^corda"):
        burnish.parse(f"corda({settings})")


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 17 does not fit"):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), "corda(rank=17)",
                     targets="0", head=False, calibration=[torch.randn(4, 16)])


def test_damping_starts_at_a_hundredth_and_doubles():
    """||C~ C~^-1 - I||_F < 0.05 by the first of 0.01, 0.02, 0.04 ... that reaches it, no later."""
    import inspect

    said = inspect.signature(damped).parameters
    assert (said["start"].default, said["bound"].default) == (0.01, 0.05)
    v = torch.randn(6, generator=torch.Generator().manual_seed(0))
    C = torch.outer(v, v)                            # rank one, in fp32
    level, eye = float(C.diagonal().mean()), torch.eye(6)

    def off(damp):
        D = C + damp * C.diagonal().mean() * eye
        inverse, info = torch.linalg.inv_ex(D)
        return float("inf") if int(info) else float((D @ inverse - eye).square().sum().sqrt())

    tried = []
    for bound in (5e-2, 1e-2, 1e-3, 1e-4):
        k = next(k for k in range(64) if off(1e-9 * 2**k) < bound)
        tried.append(k)
        D, inverse = damped(C, start=1e-9, bound=bound)
        torch.testing.assert_close(D, C + 1e-9 * 2**k * level * eye, rtol=1e-6, atol=1e-6)
        assert float((D @ inverse - eye).norm()) < bound
    assert 3 < tried[0] < tried[-1], "several had to be tried"
