"""L2-SP: a pull towards the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.provided import Term
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.site import Place
from burnish.methods.objective.l2_sp import pull, update_norm

PLACE = Place("l", "weight", "linear", 12, 9)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def test_the_norm_of_a_chain_through_gram_matrices():
    """||s B A||_F^2 = s^2 tr((A A^T)(B^T B)), value and gradients."""
    term = Chain(PLACE, 3, 0.7, dtype=torch.float64)
    nn.init.normal_(term.B)
    want = (0.7 * term.B @ term.A).square().sum()
    torch.testing.assert_close(update_norm(term), want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(update_norm(term), [term.A, term.B]),
                    torch.autograd.grad(want, [term.A, term.B]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_other_terms_through_their_dense_form():
    term = KernelDelta(PLACE, 4, 0.5, mixed=True).double()
    torch.testing.assert_close(update_norm(term), term.dense().square().sum())


def after(recipe, moved, steps=1, lr=0.1):
    """Tuned on a loss without gradient, so that only the pull acts; SGD."""
    tuned = burnish.tune(model(), recipe, head=moved == "head")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    tuned.optimizer(lr=lr)
    for _ in range(steps):
        tuned.step(torch.randn(2, 8), loss=lambda y, _: 0.0 * y.sum())
    return tuned, start


def test_full_fine_tuning_decays_towards_the_start():
    """w <- w - lr alpha (w - w0)."""
    base = dict(model().named_parameters())
    tuned, start = after("full + l2_sp(alpha=0.3, beta=0.3) + sgd", None)
    heads = tuned.anatomy.head
    for n, p in tuned.named_parameters():
        if any(n.startswith(f"{h}.") for h in heads):
            continue
        torch.testing.assert_close(p.detach(), start[n] - 0.1 * 0.3 * (start[n] - base[n]),
                                   rtol=1e-6, atol=1e-7)


def test_the_head_decays_towards_zero():
    tuned, start = after("lora(rank=2) + l2_sp(alpha=0.1, beta=0.4) + sgd", "head")
    heads = [n for n, _ in tuned.named_parameters() if ".burnish." not in n]
    assert heads
    for n in heads:
        torch.testing.assert_close(tuned.model.get_parameter(n).detach(),
                                   (1 - 0.1 * 0.4) * start[n], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "snella(rank=2)",
                                    "miss(rank=2)", "shira(rank=2)",
                                    "fact(rank=2)"])
def test_a_delta_is_pulled_to_nothing(recipe):
    """The gradient is that of alpha / 2 ||Delta||_F^2, to 1e-6."""
    tuned, start = after(f"{recipe} + l2_sp(alpha=0.5) + sgd", None)
    fresh = burnish.tune(model(), recipe, head=False)
    with torch.no_grad():
        for n, p in fresh.named_parameters():
            p.copy_(start[n])
    total = sum(t.dense().square().sum() for _, t in fresh.terms(Term)
                if type(t).__name__ != "Magnitude")
    (0.25 * total).backward()
    for n, p in fresh.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(tuned.model.get_parameter(n).detach(),
                                       start[n] - 0.1 * p.grad, rtol=1e-6, atol=1e-6,
                                       msg=lambda m, n=n: f"{n}: {m}")


def test_six_updates_written_out():                                            # findings 6
    """W <- W - lr alpha (W - W0), the head w <- w - lr beta w; A and B along the gradient of
    alpha / 2 ||s B A||_F^2: a s^2 (B^T B) A and a s^2 B (A A^T). Float64, a falling rate."""
    def run(recipe, head):
        net = model().double()
        base = {n: p.detach().clone() for n, p in net.named_parameters()}
        tuned = burnish.tune(net, recipe, head=head)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, p in tuned.named_parameters():
                p.data = p.double()
                p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
        opt = tuned.optimizer(lr=0.1)
        for t in range(6):
            for group in opt.param_groups:
                group["lr"] = 0.1 / (1 + t)
            tuned.step(torch.randn(2, 8, dtype=torch.float64), loss=lambda y, _: 0.0 * y.sum())
        return tuned, base, start

    tuned, base, start = run("full + l2_sp(alpha=0.3, beta=0.2) + sgd", True)
    heads = tuple(f"{h}." for h in tuned.anatomy.head)
    for n, p in tuned.named_parameters():
        W = start[n]
        for t in range(6):
            lr = 0.1 / (1 + t)
            W = W - lr * (0.2 * W if n.startswith(heads) else 0.3 * (W - base[n]))
        torch.testing.assert_close(p.detach(), W, rtol=1e-12, atol=1e-13, msg=n)

    tuned, _, start = run("lora(rank=2, alpha=3.0) + l2_sp(alpha=0.3) + sgd", False)
    now = dict(tuned.named_parameters())
    stems = [n.removesuffix(".A") for n in start if n.endswith(".A")]
    assert len(stems) == len(start) // 2 > 0
    for stem in stems:
        A, B, s = start[f"{stem}.A"], start[f"{stem}.B"], 1.5
        for t in range(6):
            lr = 0.1 / (1 + t)
            A, B = (A - lr * 0.3 * s**2 * B.t() @ B @ A, B - lr * 0.3 * s**2 * B @ A @ A.t())
        torch.testing.assert_close(now[f"{stem}.A"].detach(), A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(now[f"{stem}.B"].detach(), B, rtol=1e-10, atol=1e-12)


def test_updates_shrink_over_steps():
    tuned, _ = after("lora(rank=2, alpha=2.0) + l2_sp(alpha=1.0) + sgd", None, steps=60, lr=0.05)
    assert all(float(update_norm(t).detach()) < 0.5 for _, t in tuned.terms(Chain))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_the_norm_of_a_chain_forms_nothing_of_the_matrix_size():
    term = Chain(Place("l", "weight", "linear", 64, 48), 2)
    with Largest() as seen:
        update_norm(term)
    assert seen.entries <= 2 * 64


def test_experts_are_summed_over_all_of_them():
    term = Chain(Place("l", "w", "experts", 5, 6, experts=3), 2, 0.7, dtype=torch.float64)
    nn.init.normal_(term.B)
    want = sum((0.7 * term.B[e] @ term.A[e]).square().sum() for e in range(3))
    torch.testing.assert_close(update_norm(term), want)


@pytest.mark.parametrize("start", [None, torch.linspace(-1, 1, 12, dtype=torch.float64)])
def test_a_pull_is_half_the_squared_distance_with_its_gradient(start):
    p = nn.Parameter(torch.arange(12, dtype=torch.float64) / 5)
    term = pull(p, start, 0.6)
    away = p.detach() - (0 if start is None else start)
    torch.testing.assert_close(term.value(), 0.3 * (away * away).sum())
    (by_autograd,) = torch.autograd.grad(term.value(), [p])
    torch.testing.assert_close(term.gradients()[0], by_autograd)
    torch.testing.assert_close(by_autograd, 0.6 * away)


def test_strengths_nobody_named_are_the_published_ones():
    (method,) = burnish.parse("l2_sp")
    assert (method.alpha, method.beta) == (0.1, 0.01)
