"""MeZO-SVRG against its equations, dense and in float64, and what it keeps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import burnish
from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.noise import CounterNoise, ScalarLog
from burnish.blocks.update.step import compose
from burnish.blocks.update.svrg import Svrg
from burnish.core.errors import FormatError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64, LR, EPS, SEED, STEPS = torch.float64, 2e-3, 1e-2, 3, 8


def build(recipe, named, lr=LR, **kw):
    return compose([m.optimizer() for m in parse(recipe)], named, lr, **kw)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.5)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(x))))


def batch(t):
    g = torch.Generator().manual_seed(100 + t)
    return torch.randn(5, 4, generator=g, dtype=F64), torch.randn(5, 2, generator=g, dtype=F64)


def loss_on(model, t, theta=None):
    x, y = batch(t)
    out = model(x) if theta is None else functional_call(model, theta, (x,))
    return (out - y).square().mean()


def drive(settings="", steps=STEPS, start=None, rates=lambda t: LR, dtype=F64, first=0):
    model = Net().to(dtype).eval()
    opt = build(f"mezo_svrg(eps=1e-2{settings})", model.named_parameters(), seed=SEED)
    if start is not None:
        model.load_state_dict(start[0].state_dict())
        load_named_state(opt, *named_state(start[1]))
    opt.model = model
    for t in range(first, first + steps):
        for group in opt.param_groups:
            group["lr"] = rates(t)
        x, y = (v.to(dtype) for v in batch(t))
        opt.step(lambda x=x, y=y: (model(x) - y).double().square().mean())
    return model, opt


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@torch.no_grad()
def reference(seeds, every=2, batches=1, anchor_rate=1.0, queries=1, weight_decay=0.0,
              rates=lambda t: LR):
    """The equations of the docstring over whole tensors; (weights, losses)."""
    model = Net().double().eval()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    seeds, losses = iter(seeds), []

    def slope(at, z, t):
        up, down = (float(loss_on(model, t, {n: p + e * z[n] for n, p in at.items()}))
                    for e in (EPS, -EPS))
        return (up - down) / (2 * EPS), (up + down) / 2

    for t in range(STEPS):
        now = t % every
        if now == 0:
            anchor = {n: p.clone() for n, p in theta.items()}
            kept = {n: torch.zeros_like(p) for n, p in theta.items()}
        G, seen = {n: torch.zeros_like(p) for n, p in theta.items()}, []
        for _ in range(queries):
            s = next(seeds)
            z = {n: CounterNoise(s, n).normal(p.numel()).double().view(p.shape)
                 for n, p in theta.items()}
            if now < batches:
                g, mean = slope(anchor, z, t)
                share = {n: g * z[n] / batches / queries for n in theta}
                kept = {n: kept[n] + share[n] for n in theta}
                G = {n: G[n] + share[n] for n in theta}
            else:
                g, mean = slope(theta, z, t)
                g -= slope(anchor, z, t)[0]
                G = {n: G[n] + g * z[n] / queries for n in theta}
            seen.append(mean)
        losses.append(sum(seen) / queries)
        lr = rates(t) * (anchor_rate if now < batches else 1.0)
        for n in theta:
            keep = 1 - lr * weight_decay if theta[n].dim() > 1 else 1.0
            theta[n] = theta[n] * keep - lr * (G[n] if now < batches else G[n] + kept[n])
    return theta, losses


CASES = {
    "": {}, ", every=3, batches=2": {"every": 3, "batches": 2},
    ", every=4, anchor_rate=3.0, weight_decay=0.3":
    {"every": 4, "anchor_rate": 3.0, "weight_decay": 0.3},
    ", every=5, batches=3, queries=2, weight_decay=0.3, anchor_rate=0.5":
    {"every": 5, "batches": 3, "queries": 2, "weight_decay": 0.3, "anchor_rate": 0.5},
}


@pytest.mark.parametrize("settings", CASES)
def test_the_equations(settings):
    def rates(t):
        return LR / (1 + t / 4)

    model, opt = drive(settings, rates=rates)
    want, _ = reference(opt.log.seeds, rates=rates, **CASES[settings])
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[n], rtol=2e-5, atol=1e-7, msg=n)


def test_an_anchor_has_one_direction_and_every_other_update_its_own():
    _, opt = drive(", every=4, batches=2, queries=2")
    first, second = opt.log.seeds[:8], opt.log.seeds[8:]
    assert first[:2] == first[2:4] and len({*first}) == 6
    assert second[:2] == second[2:4] and not {*first} & {*second}


def test_the_loss_it_tells_is_that_of_the_weights():
    model = Net().double().eval()
    opt = build("mezo_svrg(eps=1e-2, every=3)", model.named_parameters(), seed=SEED)
    opt.model = model
    told = [opt.step(lambda t=t: loss_on(model, t)) for t in range(STEPS)]
    _, want = reference(opt.log.seeds, every=3)
    assert told == pytest.approx(want, rel=1e-6)


def test_an_anchor_s_step_is_mezo_s():
    model, _ = drive(steps=1)
    other = Net().double().eval()
    mezo = build("mezo(eps=1e-2)", other.named_parameters(), seed=SEED)
    mezo.step(lambda: loss_on(other, 0))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_on_all_the_data_it_is_a_plain_probe():
    """The same rows and the same z at the anchor and at theta: what was taken off comes back."""
    model = Net().double().eval()
    opt = build("mezo_svrg(eps=1e-2, every=4)", model.named_parameters(), seed=SEED)
    opt._seed = lambda update, query, unit: 77
    other = Net().double().eval()
    plain = build("mezo(eps=1e-2)", other.named_parameters(), seed=SEED)
    plain._seed = opt._seed
    for _ in range(4):
        opt.step(lambda: loss_on(model, 0))
        plain.step(lambda: loss_on(other, 0))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)        # g is kept in fp32


@torch.no_grad()
def test_the_mean_is_the_gradient_and_batches_differ_less():
    """L_b(w) = c_b w + w^2 / 2: near the anchor the c of one batch cancels."""
    g = torch.Generator().manual_seed(0)
    cs = torch.randn(40, 3, generator=g, dtype=F64) * 5
    anchor, away = torch.zeros(3, dtype=F64), torch.full((3,), 0.1, dtype=F64)
    moves = {"mezo": [], "mezo_svrg": []}
    for seed in range(1480):
        c = cs[seed % 40]
        for name, steps in moves.items():
            p = nn.Parameter(anchor.clone())
            opt = build(f"{name}(eps=1e-3)", [("w", p)], lr=1.0, seed=seed)
            if name == "mezo_svrg":                  # all the data at the anchor
                opt.step(lambda p=p: cs.mean(0) @ p + p @ p / 2)
            p.copy_(away)
            opt.step(lambda p=p, c=c: c @ p + p @ p / 2)
            steps.append(away - p.detach())
    want = cs.mean(0) + away
    for steps in moves.values():
        d = torch.stack(steps)
        assert ((d.mean(0) - want).abs() < 4 * d.std(0) / math.sqrt(len(d))).all()
    ratio = torch.stack(moves["mezo_svrg"]).var(0).sum() / torch.stack(moves["mezo"]).var(0).sum()
    assert ratio < 0.1


@pytest.mark.parametrize("failed", [2, 3, 4, 5])
def test_a_probe_that_fails_moves_along_the_anchor_alone(failed):
    p = nn.Parameter(torch.ones(3, dtype=F64))
    opt = build("mezo_svrg(eps=0.1)", [("w", p)], lr=0.01, seed=SEED)
    losses = iter([math.nan if k == failed else float(k * k) for k in range(6)])
    opt.step(lambda: next(losses))
    before, (s, g) = p.detach().clone(), (opt.log.seeds[0], opt.log.scalars[0])
    opt.step(lambda: next(losses))
    z = CounterNoise(s, "w").normal(3).double()
    assert opt.log.scalars[1] == 0.0 and g
    torch.testing.assert_close(p.detach(), before - 0.01 * g * z)


def test_objectives_are_probed_where_the_losses_are():
    """All of the loss as an objective of weights alone: the same steps."""
    from burnish.blocks.update.objective import OnWeights

    def value(p):
        return (p * torch.arange(4, dtype=F64)).square().sum() + p.pow(3).sum()

    ends = []
    for beside in (False, True):
        p = nn.Parameter(torch.ones(4, dtype=F64))
        opt = build("mezo_svrg(eps=1e-2, every=3, batches=2)", [("w", p)], lr=1e-3, seed=SEED)
        if beside:
            opt.terms = [OnWeights((p,), lambda p=p: value(p))]
        for _ in range(5):
            opt.step(lambda p=p, beside=beside: 0.0 if beside else value(p))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)


REPLAYED = ["", ", every=4, batches=2, queries=2, weight_decay=0.1", ", anchor_rate=2.0, every=3"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", REPLAYED)
def test_the_log_repeats_the_run_and_it_goes_on(settings, dtype):
    whole, _ = drive(settings, dtype=dtype, rates=lambda t: LR / (1 + t))
    model, opt = drive(settings, steps=STEPS - 2, dtype=dtype, rates=lambda t: LR / (1 + t))
    fresh = Net().to(dtype)
    again = build(f"mezo_svrg(eps=1e-2{settings})", fresh.named_parameters(), seed=SEED)
    again.replay(copy.deepcopy(opt.log))
    assert same(model, fresh)
    end, _ = drive(settings, 2, (fresh, again), lambda t: LR / (1 + t), dtype, STEPS - 2)
    assert same(whole, end)
    for other in ("every=7", "batches=2, every=9"):
        with pytest.raises(FormatError, match="the log was written with"):
            build(f"mezo_svrg(queries={opt.spec.queries}, {other})", fresh.named_parameters(),
                  seed=SEED).replay(opt.log)


@pytest.mark.parametrize("done", [1, 2, 3, 5])
@pytest.mark.parametrize("settings", REPLAYED)
def test_a_resumed_run_is_bit_for_bit_the_same(settings, done):
    whole, _ = drive(settings, dtype=torch.bfloat16)
    half = drive(settings, done, dtype=torch.bfloat16)
    end, _ = drive(settings, STEPS - done, half, dtype=torch.bfloat16, first=done)
    assert same(whole, end)


def test_a_log_without_its_anchor_is_refused():
    model, opt = drive(", every=4", steps=2)
    opt.log = ScalarLog(header=opt.log.header)
    opt.step(lambda: loss_on(model, 2))
    again = build("mezo_svrg(eps=1e-2, every=4)", Net().double().named_parameters(), seed=SEED)
    with pytest.raises(FormatError, match="begins between two anchors"):
        again.replay(opt.log)


def test_the_anchor_is_all_it_keeps():
    for dtype in (torch.bfloat16, torch.float32, F64):
        p = nn.Parameter(torch.ones(6, 8, dtype=dtype))
        opt = build("mezo_svrg(eps=1e-1, every=3)", [("w", p)])
        for _ in range(2):
            opt.step(lambda p=p: p.detach().float().square().sum())
        held = sum(v.nbytes for v in opt.state[p].values() if isinstance(v, torch.Tensor))
        assert held == parse("mezo_svrg")[0].state_bytes((6, 8), dtype.itemsize) \
            == 48 * dtype.itemsize
        assert torch.equal(opt.state[p]["anchor"], torch.ones(6, 8, dtype=dtype))
        here = opt.state[p]["anchor"].data_ptr()
        opt.step(lambda p=p: p.detach().float().square().sum())
        before = p.detach().clone()
        opt.step(lambda p=p: p.detach().float().square().sum())
        assert torch.equal(opt.state[p]["anchor"], before)
        assert opt.state[p]["anchor"].data_ptr() == here      # a new period needs no more


def test_the_stored_weights_and_the_anchor_are_never_written_by_a_probe():
    model, opt = drive(", every=3", rates=lambda t: 0.0)
    assert same(model, Net().double())
    assert all(torch.equal(opt.state[p]["anchor"], p) for p in model.parameters())


def test_on_a_model_the_loss_falls():
    net, data = tiny("llama")
    tuned = burnish.tune(net, "full + mezo_svrg", head=False)
    tuned.optimizer(lr=1e-3)
    losses = [float(tuned.step(data)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_what_cannot_act_is_refused():
    for settings in ("every=1", "every=3, batches=3", "batches=0"):
        with pytest.raises(RecipeError, match="mezo_svrg: a period of every="):
            parse(f"mezo_svrg({settings})")[0].optimizer()
    with pytest.raises(RecipeError, match="mezo_svrg: anchor_rate is positive, got 0"):
        parse("mezo_svrg(anchor_rate=0.0)")[0].optimizer()
    with pytest.raises(RecipeError, match="mezo_svrg: eps is positive"):
        parse("mezo_svrg(eps=0.0)")[0].optimizer()
    with pytest.raises(RecipeError, match="mezo_svrg and lisa cannot be joined.*no anchor"):
        parse("lisa + mezo_svrg")
    for other in ({"one_sided": True}, {"unit": "block"}, {"sparsity": 0.5}, {"size": "weights"},
                  {"mode": "in_place"}, {"rule": None}, {"rule": None, "scalar_sign": True}):
        with pytest.raises(RecipeError, match="probes of an anchor are two-sided, of the whole"):
            Svrg(**other)


def test_its_settings():
    (made,) = parse("mezo_svrg")
    want = {"eps": 1e-3, "queries": 1, "every": 2, "batches": 1, "anchor_rate": 1.0,
            "weight_decay": 0.0, "noise": "device"}
    assert {k: getattr(made, k) for k in want} == want
    assert parse("mezo_svrg(q=5)")[0].every == 5


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert Svrg() == parse("mezo_svrg")[0].optimizer()
