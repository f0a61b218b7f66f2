"""GLAD against its equation in plain fp64 torch, and what may not be left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.methods.controller.glad import Mixed

RHO, KAPPA, LR = 0.3, 0.7, 0.1
GLAD = f"glad(radius={RHO}, kappa={KAPPA})"


def mse(out, batch):
    return (out - batch[1]).square().mean()


class Net(nn.Module):
    """Tensors of unlike sizes, one that the loss may not reach, and a dropout."""

    def __init__(self, p=0.0):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(x))))


def start(p=0.0):
    torch.manual_seed(0)
    net = Net(p).double()
    g = torch.Generator().manual_seed(1)
    return net, [(torch.randn(5, 6, generator=g).double(), torch.randn(5, 3, generator=g).double())
                 for _ in range(4)]


def mixed(net, batch, rho=RHO, kappa=KAPPA):
    """g' as it is written, dropout the same in both passes."""
    params = list(net.parameters())
    random = torch.get_rng_state()
    g = torch.autograd.grad(mse(net(batch[0]), batch), params)
    norm = sum(float(t.square().sum()) for t in g) ** 0.5
    there = copy.deepcopy(net)
    with torch.no_grad():
        for p, t in zip(there.parameters(), g, strict=True):
            p += rho * t / norm
    torch.set_rng_state(random)
    h = torch.autograd.grad(mse(there(batch[0]), batch), list(there.parameters()))
    return [(1 - kappa) * a + kappa * b for a, b in zip(g, h, strict=True)]


def by_hand(net, updates):
    net = copy.deepcopy(net)
    for micro in updates:
        total = [torch.zeros_like(p) for p in net.parameters()]
        for batch in micro:
            for t, g in zip(total, mixed(net, batch), strict=True):
                t += g / len(micro)
        with torch.no_grad():
            for p, g in zip(net.parameters(), total, strict=True):
                p -= LR * g
    return net


def same(net, other):
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_steps_are_the_equations(p):
    net, batches = start(p)
    torch.manual_seed(7)
    want = by_hand(net, [[b] for b in batches])
    after = torch.get_rng_state()
    tuned = burnish.tune(net, f"full + {GLAD} + sgd", head=True)
    tuned.optimizer(LR)
    torch.manual_seed(7)
    for b in batches:
        tuned.step(b, mse)
    same(tuned.model, want)
    assert torch.equal(torch.get_rng_state(), after)


def test_each_micro_batch_has_a_step_of_its_own():
    net, batches = start(0.3)
    torch.manual_seed(7)
    want = by_hand(net, [batches[:2], batches[2:]])
    tuned = burnish.tune(net, f"full + {GLAD} + sgd", head=True)
    opt = tuned.optimizer(LR)
    torch.manual_seed(7)
    for micro in (batches[:2], batches[2:]):
        opt.zero_grad()
        for b in micro:
            tuned.backward(b, mse, scale=1 / 2)
        opt.step()
    same(tuned.model, want)


def test_a_loss_scale_cancels():
    net, batches = start()
    want = by_hand(net, [[b] for b in batches[:2]])
    tuned = burnish.tune(net, f"full + {GLAD} + sgd", head=True)
    opt = tuned.optimizer(LR)
    for b in batches[:2]:
        opt.zero_grad()
        tuned.backward(b, mse, scale=4096.0)
        for p in tuned.parameters():
            p.grad /= 4096
        opt.step()
    same(tuned.model, want)


def test_on_a_quadratic_the_gradient_is_the_closed_form():
    """L = w^T H w / 2: g' = (I + kappa rho H / |g|) g."""
    torch.manual_seed(0)
    M = torch.randn(5, 5).double()
    H = M @ M.t()
    net = nn.Linear(5, 1, bias=False).double()
    w = net.weight.detach().clone().flatten()
    tuned = burnish.tune(nn.Sequential(net), f"full + {GLAD} + sgd", head=True)
    tuned.optimizer(LR)
    tuned.step((torch.eye(5).double(), None),
               loss=lambda out, _: (out.t() @ H @ out).squeeze() / 2)
    g = H @ w
    want = g + KAPPA * RHO * H @ g / g.norm()
    torch.testing.assert_close(net.weight.detach().flatten(), w - LR * want)


def test_without_a_distance_it_is_the_plain_recipe_bit_for_bit():
    ends = []
    for recipe in ("lora(rank=2) + sgd", f"lora(rank=2) + {GLAD} + sgd"):
        net, batches = start()
        tuned = burnish.tune(net, recipe, targets="a,b", head=False)
        tuned.optimizer(LR)
        for h in (h for _, h in tuned.timeline.handlers if isinstance(h, Mixed)):
            h.radius, h.kappa, h.looked = 0.0, 0.5, True       # halves of one gradient
        for b in batches:
            tuned.step(b, mse)
        ends.append(tuned.tensors())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_weights_are_back_bit_for_bit_and_only_what_trains_has_moved():
    net, batches = start()
    tuned = burnish.tune(net, f"lora(rank=2) + {GLAD} + sgd", targets="a,b", head=False)
    tuned.optimizer(LR)
    tuned.step(batches[0], mse)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    was = []
    hook = net.a.register_forward_pre_hook(
        lambda *_: was.append({n: p.detach().clone() for n, p in net.named_parameters()}))
    tuned.backward(batches[1], mse)
    hook.remove()
    assert len(was) == 2 and all(torch.equal(was[0][n], before[n]) for n in before)
    moved = {n for n in before if not torch.equal(was[1][n], before[n])}
    assert moved == {n for n, _ in tuned.named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    step = sum(float((was[1][n] - before[n]).double().square().sum()) for n in moved) ** 0.5
    assert step == pytest.approx(RHO, rel=1e-5)


def test_a_tensor_that_one_pass_does_not_reach_keeps_what_waits():
    """By hand: what the handler does with gradients that are missing on either side."""
    p = {n: nn.Parameter(torch.zeros(2)) for n in "abcd"}

    class Step:
        def parameters(self):
            return dict(p)

        def probe(self, statistics):
            assert statistics
            return type("Probe", (), {"grads": {n: torch.ones(2) for n in "ab"}})

        def unmoved(self):
            return torch.no_grad()

    p["a"].grad = torch.full((2,), 10.0)
    p["c"].grad = torch.full((2,), 20.0)
    handler = Mixed("glad", 0.1, 0.25)
    around = handler.around_step(Step())
    next(around)
    assert all(t.grad is None for t in p.values())
    p["a"].grad = torch.full((2,), 3.0)
    with pytest.raises(StopIteration):
        next(around)
    assert p["a"].grad.tolist() == [10 + 0.75 + 0.25 * 3] * 2
    assert p["b"].grad.tolist() == [0.75] * 2 and p["c"].grad.tolist() == [20.0] * 2
    assert p["d"].grad is None


def test_refusals_and_defaults():
    for settings in ("radius=0", "radius=-1", "radius=1e999", "kappa=0", "kappa=1"):
        with pytest.raises(RecipeError, match="^glad"):
            parse(f"glad({settings})")
    assert parse("glad")[0].settings() == {"targets": None, "radius": 0.05, "kappa": 0.5}
    with pytest.raises(RecipeError, match="where the gradient is taken"):
        parse("glad + sam")
    with pytest.raises(RecipeError, match="step_in_backward"):
        parse("full + glad + step_in_backward")
    net, batches = start()
    tuned = burnish.tune(net.bfloat16(), "full + glad(radius=1e-7)", head=True)
    tuned.optimizer(LR)
    with pytest.raises(CheckError, match="glad: radius=1e-07 moves no weight"):
        tuned.step(tuple(t.bfloat16() for t in batches[0]), mse)
