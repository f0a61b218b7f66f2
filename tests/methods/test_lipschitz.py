"""Lipschitz-bounded updates: the nearest matrix in the ball, and the penalty outside of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import burnish
from burnish.blocks.update import spectral_ball as ball
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RecipeError
from burnish.testing import stir, tiny


def nearest(D, bound):
    """Singular values cut off, in float64."""
    U, S, Vt = torch.linalg.svd(D.double(), full_matrices=False)
    return U @ torch.diag(S.clamp_max(bound)) @ Vt


@pytest.mark.parametrize("shape", [(9, 12, 3), (12, 4, 6), (5, 5, 8)])
@pytest.mark.parametrize("bound", [0.5, 3.0, 1e6])
def test_a_chain_is_clipped_to_the_nearest_matrix(shape, bound):
    out, inp, rank = shape
    g = torch.Generator().manual_seed(0)
    B = torch.randn(out, rank, generator=g, dtype=torch.float64)
    A = torch.randn(rank, inp, generator=g, dtype=torch.float64)
    want, was = nearest(B @ A, bound), B.clone()
    U, S, Vt = ball.chain(B, A)
    k = min(out, inp, rank)
    torch.testing.assert_close(S[:k], torch.linalg.svdvals(B @ A)[:k])
    torch.testing.assert_close(U * S.unsqueeze(0) @ Vt, B @ A)
    ball.clip_(B, U, S, bound)
    torch.testing.assert_close(B @ A, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(B, was) == (bound == 1e6)


def test_experts_are_clipped_one_by_one():
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(3, 7, 2, generator=g).double(), torch.randn(3, 2, 6, generator=g).double()
    B[1] *= 1e-3
    want = torch.stack([nearest(b @ a, 0.7) for b, a in zip(B, A, strict=True)])
    U, S, _ = ball.chain(B, A)
    ball.clip_(B, U, S, 0.7)
    torch.testing.assert_close(B @ A, want, rtol=1e-9, atol=1e-10)


def test_the_norm_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    B, A = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
            for s in ((9, 3), (3, 5)))
    mine = torch.autograd.grad(ball.excess(ball.norm_of_chain(B, A), 0.4), [B, A])
    dense = (torch.linalg.matrix_norm(B @ A, 2) - 0.4).clamp_min(0).square()
    for a, b in zip(mine, torch.autograd.grad(dense, [B, A]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert ball.excess(ball.norm_of_chain(B, A), 1e3) == 0
    experts = torch.stack([B, 3 * B, 0.01 * B]), torch.stack([A, A, A])
    norms = ball.norm_of_chain(*experts)
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(experts[0] @ experts[1], 2))
    beyond = [max(0.0, n - 0.4) ** 2 for n in norms.tolist()]
    assert beyond[0] and beyond[1] and not beyond[2]
    assert ball.excess(norms, 0.4).item() == pytest.approx(sum(beyond))


def stepped(recipe, model="bert", lr=0.5):
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, recipe, head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    tuned.optimizer(lr=lr)
    return tuned, batch


def updates(tuned):
    out = {n: (t.scale * t.B @ t.A).detach() for n, t in tuned.terms(Chain)}
    for n, p in tuned.named_parameters():
        if ".burnish." not in f".{n}" and p.dim() > 1 and not n.startswith("classifier"):
            path, _, leaf = n.rpartition(".")
            out[n] = (p.detach() - tuned.originals.get(path, leaf)).flatten(1)
    return out


@pytest.mark.parametrize("recipe, model", [("lora(rank=3)", "bert"), ("full", "vit"),
                                           ("lora(rank=2)", "convnext")])
def test_after_a_step_every_update_is_what_was_stepped_to_clipped(recipe, model):
    free, batch = stepped(f"{recipe} + sgd", model)
    held, _ = stepped(f"{recipe} + lipschitz(bound=0.3) + sgd", model)
    free.step(batch)
    held.step(batch)
    mine, theirs = updates(held), updates(free)
    assert any(torch.linalg.matrix_norm(d, 2) > 0.31 for d in theirs.values())
    for n, d in theirs.items():
        torch.testing.assert_close(mine[n], nearest(d, 0.3), rtol=1e-6, atol=1e-8, msg=n)


@pytest.mark.parametrize("recipe, model", [("lora(rank=3)", "bert"), ("full", "vit")])
def test_the_penalty_is_part_of_the_gradient(recipe, model):
    tuned, batch = stepped(f"{recipe} + lipschitz(bound=0.3, mode='penalty', weight=0.7)", model)
    net = tuned.model
    tuned.loss(batch).backward()
    got = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    free, _ = stepped(recipe, model)
    loss = free.model(**batch).loss
    named = dict(free.named_parameters())
    for _, t in free.terms(Chain):
        D = t.scale * t.B @ t.A
        loss = loss + 0.7 * (torch.linalg.matrix_norm(D, 2) - 0.3).clamp_min(0) ** 2
    for n, p in named.items():
        if ".burnish." not in f".{n}" and p.dim() > 1 and not n.startswith("classifier"):
            path, _, leaf = n.rpartition(".")
            D = (p - free.originals.get(path, leaf)).flatten(1)
            loss = loss + 0.7 * (torch.linalg.matrix_norm(D, 2) - 0.3).clamp_min(0) ** 2
    want = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert net is not free.model
    for (n, _), g in zip(named.items(), want, strict=True):
        if g is not None:
            torch.testing.assert_close(got[n], g, rtol=1e-5, atol=1e-8, msg=n)


def test_of_a_wide_matrix_nothing_larger_than_itself_is_made():
    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out)
                                                if isinstance(t, torch.Tensor))])
            return out

    net = nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 3))
    tuned = burnish.tune(net, "full + lipschitz(mode='penalty', bound=0.01)", head=False)
    stir(tuned, size=0.1)
    terms = list(tuned.recipe[-1].objective(tuned, None))
    with Watch() as watch:
        assert sum(float(t.value().detach()) for t in terms) > 0
    assert watch.largest == 1200


def test_heads_norms_and_biases_are_free():
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "full + lipschitz(bound=1e-3) + sgd", head=True)
    tuned.optimizer(lr=1.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    tuned.step(x, loss=lambda y, _: 10 * y.square().sum())
    moved = {n: p - dict(base.named_parameters())[n] for n, p in net.named_parameters()}
    assert torch.linalg.matrix_norm(moved["0.weight"], 2) <= 1e-3 * (1 + 1e-9)
    assert moved["1.weight"].norm() > 1e-2 and moved["0.bias"].norm() > 1e-2
    if tuned.anatomy.head:
        assert torch.linalg.matrix_norm(moved["2.weight"], 2) > 1e-2


def test_refusals():
    assert burnish.parse("lipschitz")[0].settings() == {
        "targets": None, "bound": 1.0, "mode": "project", "weight": 1.0}
    for bad in ("bound=0.0", "weight=-1.0"):
        with pytest.raises(RecipeError, match="bound and weight above 0"):
            burnish.parse(f"lipschitz({bad})")
    with pytest.raises(RecipeError, match="bounds the updates B A.*stands"):
        stepped("loha(rank=2) + lipschitz")
    with pytest.raises(RecipeError, match="nothing that .* trains is a matrix"):
        stepped("bitfit + lipschitz")
