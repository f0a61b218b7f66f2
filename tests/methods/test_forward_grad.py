"""Forward-Grad: the slope along a drawn direction, against autograd in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.forward import ForwardGrad
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.step import compose
from burnish.core.errors import BurnishError, ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

F64, LR, SEED = torch.float64, 3e-3, 3
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=F64)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()


def loss_at(net):
    return (net(X) - Y).square().mean()


def build(settings, net, **kw):
    opt = compose([m.optimizer() for m in parse(f"forward_grad({settings})")],
                  net.named_parameters(), LR, seed=SEED, **kw)
    opt.model = net
    return opt


@pytest.mark.parametrize("settings, queries, decay", [("", 1, 0.0), ("queries=3", 3, 0.0),
                                                      ("weight_decay=0.1", 1, 0.1)])
def test_steps_are_those_of_the_equation(settings, queries, decay):
    net = model()
    opt, ref = build(settings, net), copy.deepcopy(net)
    for _ in range(4):
        mean = opt.step(lambda: loss_at(net))
        grads = torch.autograd.grad(loss_at(ref), list(ref.parameters()))
        assert mean == pytest.approx(float(loss_at(ref).detach()), rel=1e-9)
        moves = [torch.zeros_like(p) for p in ref.parameters()]
        for seed in opt.log.seeds[-queries:]:
            v = [CounterNoise(seed, n).normal(p.numel()).double().view(p.shape)
                 for n, p in ref.named_parameters()]
            g = sum(float((a * b).sum()) for a, b in zip(grads, v, strict=True)) / queries
            for m, z in zip(moves, v, strict=True):
                m.add_(z, alpha=g)
        with torch.no_grad():
            for p, m in zip(ref.parameters(), moves, strict=True):
                p.mul_(1 - LR * decay if p.dim() > 1 else 1.0).sub_(m, alpha=LR)
        for a, b in zip(net.parameters(), ref.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_the_slope_is_the_central_difference_as_eps_goes_to_zero():
    net = model()
    start = [p.clone() for p in net.parameters()]
    opt = build("", net)
    opt.step(lambda: loss_at(net))
    (g,), (seed,) = opt.log.scalars, opt.log.seeds
    off = []
    for eps in (1e-1, 1e-2, 1e-3):
        values = []
        for side in (eps, -eps):
            for (n, p), s in zip(net.named_parameters(), start, strict=True):
                p.copy_(s + side * CounterNoise(seed, n).normal(p.numel()).double().view(p.shape))
            values.append(float(loss_at(net)))
        off.append(abs((values[0] - values[1]) / (2 * eps) - g))
    assert off[0] > 50 * off[1] and off[1] > 50 * off[2] or off[2] < 1e-6
    assert off[2] < 1e-4 * abs(g) + 1e-6


def test_the_mean_is_the_gradient():
    n, w = 3000, torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    net = nn.Linear(3, 1, bias=False).double()
    opt = compose([parse("forward_grad")[0].optimizer()], net.named_parameters(), 1.0, seed=SEED)
    opt.model = net
    total = torch.zeros(3, dtype=F64)
    for _ in range(n):
        net.weight.data.zero_()
        opt.step(lambda: net(w.unsqueeze(0)).sum())
        total -= net.weight.detach()[0]
    assert (total / n - w).norm() < 5 * (5**0.5 * w.norm()) / n**0.5


def test_weights_are_read_and_stand_where_they_stood():
    net = model()
    own = {n: (p, p.data_ptr()) for n, p in net.named_parameters()}
    opt = build("", net)

    def closure():
        assert all(m._parameters["weight"] is not own[f"{k}.weight"][0]
                   for k, m in net.named_children() if k != "1")
        return loss_at(net)

    opt.step(closure)
    assert all(p is own[n][0] and p.data_ptr() == own[n][1] for n, p in net.named_parameters())
    assert not opt.state and parse("forward_grad")[0].state_bytes((6, 8), 4) == 0


def test_the_log_repeats_the_run():
    net = model()
    fresh, opt = copy.deepcopy(net), build("queries=2", net)
    for _ in range(5):
        opt.step(lambda: loss_at(net))
    again = build("queries=2", fresh)
    again.replay(copy.deepcopy(opt.log))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(),
                                                 strict=True))


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)", "nf4 + lora(rank=2)"])
def test_on_a_model_the_loss_falls(recipe):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"{recipe} + forward_grad", head=False)
    if recipe != "full":
        stir(tuned)
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(25)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(p.grad is None for p in net.parameters())


def test_the_slope_of_a_model_is_autograd_s():
    net, batch = tiny("bert", dtype=F64)
    ref = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "full + forward_grad", head=False)
    opt = tuned.optimizer(lr=0.0)
    tuned.step(batch)
    names = [n for g in opt.param_groups for n in g["param_names"]]
    own = dict(ref.named_parameters())
    grads = torch.autograd.grad(ref(**batch).loss, [own[n] for n in names], allow_unused=True)
    want = sum(float((g.flatten() * CounterNoise(opt.log.seeds[0], n).normal(g.numel())).sum())
               for n, g in zip(names, grads, strict=True) if g is not None)
    assert opt.log.scalars[0] == pytest.approx(want, rel=1e-5)


def test_a_simulation_knows_the_tangents_and_says_where_it_cannot():
    net, batch = tiny("llama")
    whole, mezo = (burnish.simulate(net, f"full + {r}", batch).peak_bytes
                   for r in ("forward_grad", "mezo"))
    trained = sum(p.nbytes for p in net.parameters())
    assert whole > mezo + 0.8 * trained
    net, batch = tiny("mixtral")
    with pytest.raises(BurnishError, match="burnish.measure runs one"):
        burnish.simulate(net, "full + forward_grad", batch)


def test_grouped_experts_run_one_by_one_and_are_grouped_again():
    net, batch = tiny("mixtral")
    was = net.config._experts_implementation
    tuned = burnish.tune(net, "lora(rank=2) + forward_grad", head=False)
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    assert net.config._experts_implementation == was != "eager"


def test_what_cannot_act_is_refused():
    net = model()
    opt = compose([parse("forward_grad")[0].optimizer()], net.named_parameters(), LR, seed=SEED)
    with pytest.raises(ConfigError, match="set optimizer.model"):
        opt.step(lambda: loss_at(net))
    opt.model = net
    with pytest.raises(BurnishError, match="no slope along what trains"):
        opt.step(lambda: float(loss_at(net)))
    with pytest.raises(RecipeError, match="queries at least 1"):
        parse("forward_grad(queries=0)")[0].optimizer()
    for beside in ("l2_sp", "distill"):
        with pytest.raises(BurnishError, match="read off the task's loss alone"):
            burnish.tune(tiny("bert")[0], f"full + {beside} + forward_grad").optimizer(lr=1e-3)
    assert parse("forward_grad")[0].settings() == {
        "targets": None, "queries": 1, "weight_decay": 0.0, "noise": "device"}


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert ForwardGrad() == parse("forward_grad")[0].optimizer()
