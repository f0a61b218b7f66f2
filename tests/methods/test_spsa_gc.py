"""SPSA-GC against its equations, dense and in float64; the mean of its estimate; its log."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import burnish
from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.rules import SGD
from burnish.blocks.update.spsa import Divided, Spsa
from burnish.blocks.update.step import compose
from burnish.core.errors import FormatError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64, SEED = torch.float64, 3
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=F64)


def build(settings, named, lr=0.01, **kw):
    return compose([m.optimizer() for m in parse(f"spsa_gc({settings})")], named, lr, **kw)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()


def loss_at(model, theta=None):
    out = model(X) if theta is None else functional_call(model, theta, (X,))
    return (out - Y).square().mean()


def drive(settings, steps=6):
    model = net()
    opt = build(settings, model.named_parameters(), seed=SEED)
    opt.model = model
    for _ in range(steps):
        opt.step(lambda: loss_at(model))
    return model, opt


def draw(seed, name, shape):
    """|d| ~ U(1/2, 1) and a sign, both of one uniform number."""
    u = CounterNoise(seed, name).uniform(math.prod(shape)).double().view(shape)
    return torch.where(u < 0.5, -1.0, 1.0) * (0.5 + (u - 0.5).abs())


@torch.no_grad()
def reference(seeds, steps=6, lr=0.01, c=0.01, gamma=0.1, alpha=0.4, o=1.0, n=5, b=0.9, wd=0.0):
    model, seeds = net(), iter(seeds)
    theta = {k: p.detach().clone() for k, p in model.named_parameters()}
    m = {k: torch.zeros_like(p) for k, p in theta.items()}
    for i in range(1, steps + 1):
        ci, ai = c / i**gamma, lr / (i + o) ** alpha
        G = {k: torch.zeros_like(p) for k, p in theta.items()}
        for _ in range(n):
            s = next(seeds)
            d = {k: draw(s, k, p.shape) for k, p in theta.items()}
            up = loss_at(model, {k: p + ci * d[k] for k, p in theta.items()})
            down = loss_at(model, {k: p - ci * d[k] for k, p in theta.items()})
            G = {k: G[k] + (up - down) / (2 * ci * d[k]) / n for k in theta}
        for k in theta:
            m[k] = b * m[k] + G[k]
            keep = 1 - ai * wd if theta[k].dim() > 1 else 1.0
            theta[k] = theta[k] * keep - ai * (G[k] + b * m[k])
    return theta


CASES = {"": {}, "eps=1e-3, eps_power=0.2, rate_power=0.7, offset=4.0, queries=2":
         {"c": 1e-3, "gamma": 0.2, "alpha": 0.7, "o": 4.0, "n": 2},
         "momentum=0.0, queries=1": {"b": 0.0, "n": 1}, "mode='in_place', weight_decay=0.3":
         {"wd": 0.3}}


@pytest.mark.parametrize("settings", CASES)
def test_the_equations(settings):
    model, opt = drive(settings)
    want = reference(opt.log.seeds, **CASES[settings])
    for n, p in model.named_parameters():
        assert not torch.equal(p, dict(net().named_parameters())[n])
        torch.testing.assert_close(p.detach(), want[n], rtol=1e-5, atol=1e-8, msg=n)
    assert len(set(opt.log.seeds)) == len(opt.log.seeds)


def test_the_schedules_are_those_of_spall():
    """c_i = c / i^gamma and a_i = a / (i + o)^alpha, i from 1: written out for the defaults."""
    _, opt = drive("queries=1", steps=3)
    rates = [row[0] for row in opt.log.lrs]
    assert rates == pytest.approx([0.01 / 2**0.4, 0.01 / 3**0.4, 0.01 / 4**0.4], rel=1e-12)
    assert [opt._radius(i) for i in range(3)] == \
        pytest.approx([0.01, 0.01 / 2**0.1, 0.01 / 3**0.1], rel=1e-12)
    made = parse("spsa_gc")[0]
    assert (made.eps, made.eps_power, made.rate_power, made.offset, made.queries, made.momentum) \
        == (0.01, 0.1, 0.4, 1.0, 5, 0.9)


def test_the_mean_of_the_estimate_is_the_gradient_of_a_quadratic():
    """Two-sided differences of a quadratic are exact, so only the draws are left to average."""
    A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]], dtype=F64)
    at = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    p, n = nn.Parameter(at.clone()), 4000
    opt = build("queries=1, momentum=0.0, rate_power=0.0", [("w", p)], lr=1.0, seed=SEED)
    found = []
    for _ in range(n):
        opt.step(lambda: p @ A @ p / 2)
        found.append(at - p.detach())
        p.data.copy_(at)
    found = torch.stack(found)
    off = (found.mean(0) - A @ at).abs()
    assert bool((off <= 4 * found.std(0) / math.sqrt(n)).all()) and float(off.max()) < 0.2


@pytest.mark.parametrize("noise", ["device", "portable"])
def test_no_entry_of_a_probe_is_near_zero(noise):
    from burnish.blocks.update.noise import STREAMS

    d = Divided(STREAMS[noise], inverse=False)(7, "w").normal(40000)
    assert float(d.abs().min()) >= 0.5 and float(d.abs().max()) <= 1
    assert abs(float((d > 0).float().mean()) - 0.5) < 0.01
    assert abs(float(d.abs().mean()) - 0.75) < 0.005
    inverse = Divided(STREAMS[noise], inverse=True)(7, "w").normal(100, 300)
    assert torch.equal(inverse, 1 / d[300:400])


def test_a_number_from_a_service_is_enough():
    """No graph is made: the loss is a plain number, of weights that ask for no gradient here."""
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    opt = build("", [("w", p)], lr=0.05)
    seen = []

    def service():
        assert not torch.is_grad_enabled()
        seen.append(1)
        return sum(x * x for x in p.tolist())

    for _ in range(40):
        opt.step(service)
    assert sum(x * x for x in p.tolist()) < 13 / 2
    assert len(seen) == 40 * 2 * 5                   # 2 n_avg queries an update


def test_the_log_repeats_the_run_and_nobody_else_s():
    model, opt = drive("queries=2")
    fresh = net()
    again = build("queries=2", fresh.named_parameters(), seed=SEED)
    again.replay(copy.deepcopy(opt.log))
    for (_, a), (_, b) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b)
    for other in ("queries=2, eps_power=0.2", "queries=2, rate_power=0.6",
                  "queries=2, offset=3.0", "queries=2, momentum=0.5"):
        with pytest.raises(FormatError, match="the log was written with"):
            build(other, net().named_parameters(), seed=SEED).replay(opt.log)


def test_a_resumed_run_is_bit_for_bit_the_same():
    whole, _ = drive("")
    first, opt = drive("", steps=2)
    second = net()
    second.load_state_dict(first.state_dict())
    again = build("", second.named_parameters(), seed=SEED)
    load_named_state(again, *named_state(opt))
    again.model = second
    for _ in range(4):
        again.step(lambda: loss_at(second))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(),
                                                 strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64], ids=str)
def test_without_a_rule_it_is_plain_descent_rounded_by_noise_of_its_own(dtype):
    ends = {}
    for rule in (None, SGD()):
        p = nn.Parameter(torch.full((40, 50), 0.5, dtype=dtype))
        opt = compose([Spsa(rule=rule, queries=1)], [("w", p)], 1e-3, seed=SEED)
        losses = iter([0.02, 0.0])
        opt.step(lambda losses=losses: next(losses))
        ends[rule] = p.detach().double()
        seed, g, lr = opt.log.seeds[0], opt.log.scalars[0], opt.log.lrs[0][0]
    exact = 0.5 - lr * g / draw(seed, "w", (40, 50)).double()
    if dtype == F64:
        for end in ends.values():
            torch.testing.assert_close(end, exact, rtol=1e-6, atol=0)
        return
    for end in ends.values():                        # of 2^-9 below a half, 2^-8 above
        assert ((end - exact).abs() < 2**-8).all() and len(end.unique()) > 2
        assert abs(float((end - exact).mean())) < 5 * 2**-9 / 2000**0.5


@pytest.mark.parametrize("momentum, count", [(0.9, 1), (0.0, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_what_is_kept_is_what_it_says(momentum, count, dtype):
    p = nn.Parameter(torch.ones(6, 8, dtype=dtype))
    opt = build(f"momentum={momentum}, eps=1e-1", [("w", p)])
    opt.step(lambda: p.detach().float().square().sum())
    held = sum(v.nbytes for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor))
    assert held == count * 48 * max(4, dtype.itemsize)
    assert parse(f"spsa_gc(momentum={momentum})")[0].state_bytes((6, 8), dtype.itemsize) == held


def test_on_a_model_the_loss_falls():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bitfit + spsa_gc(queries=2)", head=True)
    tuned.optimizer(lr=0.02)
    losses = [float(tuned.step(batch)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_what_cannot_act_is_refused():
    for settings in ("momentum=1.0", "momentum=-0.1"):
        with pytest.raises(RecipeError, match="spsa_gc: momentum is at least 0 and below 1"):
            parse(f"spsa_gc({settings})")
    for name in ("eps_power", "rate_power", "offset"):
        with pytest.raises(RecipeError, match=rf"^spsa_gc\({name}=-0.1\): expected 0 or more"):
            parse(f"spsa_gc({name}=-0.1)")
        with pytest.raises(RecipeError, match=f"an offset of at least 0; got .*{name}=-0.1"):
            Spsa(**{name: -0.1})
        assert getattr(Spsa(**{name: 0.0}), name) == 0.0
    with pytest.raises(RecipeError, match="spsa_gc: eps is positive"):
        parse("spsa_gc(eps=0.0)")[0].optimizer()
    with pytest.raises(RecipeError, match="gradient"):
        parse("snella + spsa_gc")


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert Spsa() == parse("spsa_gc")[0].optimizer()
