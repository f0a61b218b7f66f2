"""MeZO: the estimate against autograd, exact replay, untouched weights, and what is kept."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.noise import CounterNoise, PortableNoise, ScalarLog
from burnish.blocks.update.rules import Lion
from burnish.blocks.update.step import InBackward, Rounding, Subspace, compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.blocks.update.zeroth import ZerothOrder
from burnish.core.errors import FormatError, RecipeError
from burnish.core.recipe import parse


def build(recipe, named, lr, **kw):
    return compose([m.optimizer() for m in parse(recipe)], named, lr, **kw)


class Tangle(nn.Module):
    """Tied weights, a layer used twice, and attention that reads a child it never calls."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.loose = nn.Parameter(torch.zeros(8))
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0] + self.loose
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        return self.head(self.norm(x))


IDS = torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    return nn.functional.cross_entropy(model(IDS).float().flatten(0, 1), IDS.flatten())


def tangle(dtype=torch.float32):
    return Tangle().to(dtype).eval()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def shifted(model, seed, scale):
    """theta + scale z, the dense way, as a dict for functional_call."""
    return {n: p + scale * CounterNoise(seed, n).normal(p.numel()).view(p.shape).to(p.dtype)
            for n, p in model.named_parameters()}


# -- the estimate ---------------------------------------------------------------------------
def test_the_mean_of_g_z_is_the_gradient_of_a_quadratic():
    d, n = 16, 1500
    g = torch.Generator().manual_seed(0)
    H = torch.randn(d, d, generator=g, dtype=torch.float64)
    H = H @ H.t() / d
    p = nn.Parameter(torch.randn(d, generator=g, dtype=torch.float64))
    b = torch.randn(d, generator=g, dtype=torch.float64)

    def loss():
        return 0.5 * p @ H @ p + b @ p

    loss().backward()
    grad, start = p.grad.clone(), p.detach().clone()
    total, square = torch.zeros(d, dtype=torch.float64), 0.0
    opt = build("mezo", [("w", p)], lr=1.0)
    for _ in range(n):
        opt.step(loss)
        move = start - p.detach()                    # lr 1: exactly g z
        total += move
        square += move.square().sum().item()
        p.data.copy_(start)
    spread = grad.norm().item() * math.sqrt((d + 1) / n)
    assert (total / n - grad).norm() < 2 * spread
    assert square / n == pytest.approx((d + 2) * grad.square().sum().item(), rel=0.25)


@torch.no_grad()
def test_six_steps_are_the_formula():                                           # findings 6
    """g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), averaged over two probes at the same
    weights; theta <- theta - lr (g z + wd theta), matrices alone decayed; a falling rate."""
    model, reference = tangle(torch.float64), tangle(torch.float64)
    opt = build("mezo(queries=2, weight_decay=0.1, eps=1e-2)", model.named_parameters(), lr=1e-2,
                seed=3)
    opt.model = model

    def exact(out):
        return nn.functional.cross_entropy(out.flatten(0, 1), IDS.flatten())

    for t in range(6):
        lr = opt.param_groups[0]["lr"] = 1e-2 / (1 + t)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step(lambda: exact(model(IDS)))
        theta = weights(reference)
        want = {n: w * (1 - lr * 0.1 * (w.dim() > 1)) for n, w in theta.items()}
        for s, g in zip(opt.log.seeds[-2:], opt.log.scalars[-2:], strict=True):
            up, down = (exact(torch.func.functional_call(
                reference, shifted(reference, s, e), (IDS,))).item() for e in (1e-2, -1e-2))
            assert g == pytest.approx((up - down) / 2e-2 / 2, rel=1e-6)   # z is fp32
            for n in want:
                z = CounterNoise(s, n).normal(want[n].numel()).view(want[n].shape).double()
                want[n] = want[n] - lr * (up - down) / 2e-2 / 2 * z
        for n, p in reference.named_parameters():
            p.copy_(want[n])
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), want[n], rtol=0, atol=1e-8)
    assert len(opt.log.scalars) == 12 and len(set(opt.log.seeds)) == 12


@pytest.mark.parametrize("word, stream", [("device", CounterNoise), ("portable", PortableNoise)])
def test_z_is_drawn_from_the_stream_asked_for(word, stream):
    """Losses 1e-3 and -1e-3 at eps 1e-3 are g = 1; with lr 1 the step is z itself."""
    p = nn.Parameter(torch.zeros(40))
    opt = build(f"mezo(noise={word!r})", [("w", p)], lr=1.0)
    losses = iter([1e-3, -1e-3])
    opt.step(lambda: next(losses))
    z = stream(opt.log.seeds[0], "w").normal(40)
    torch.testing.assert_close(p.detach(), -z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("queries", [1, 2])
def test_a_steep_probe_is_cut(queries):
    """Slopes of 50 and -20 under a bound of 30: no step is longer than lr 30 ||z||."""
    p = nn.Parameter(torch.zeros(40))
    opt = build(f"mezo(eps=0.5, g_max=30.0, queries={queries})", [("w", p)], lr=1.0)
    losses = iter([50.0, 0.0, 0.0, 20.0, math.inf, 0.0, 0.0, 90.0])
    for _ in range(4 // queries):
        opt.step(lambda: next(losses))
    assert opt.log.scalars == [g / queries for g in (30.0, -20.0, 0.0, -30.0)]
    (free,) = parse("mezo(g_max=0.0)")
    assert free.optimizer().bound == 0
    with pytest.raises(RecipeError, match="mezo: a bound of |g| is positive, or 0 for none"):
        parse("mezo(g_max=-1.0)")[0].optimizer()


def test_it_keeps_nothing_beside_a_weight():
    assert parse("mezo")[0].state_bytes((6, 9), 4) == 0


def test_it_descends_without_gradients():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 1)
    opt = build("mezo(queries=4)", model.named_parameters(), lr=2e-2)
    opt.model = model
    losses = [opt.step(lambda: (model(x) - y).square().mean()) for _ in range(100)]
    assert losses[-1] < 0.05 * losses[0]
    assert all(p.grad is None for p in model.parameters()) and not opt.state


def test_a_loss_without_a_gradient_will_do():
    p = nn.Parameter(torch.tensor([0.4]))
    opt = build("mezo(eps=0.5)", [("w", p)], lr=0.1)
    for _ in range(60):
        opt.step(lambda: float(round(abs(p.item()) * 4)))        # steps, as accuracy has
    assert abs(p.item()) < 0.4


# -- modes ----------------------------------------------------------------------------------
@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_leaves_the_stored_weights_alone(layerwise, dtype):
    model = tangle(dtype)
    before = weights(model)
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    opt = build("mezo", model.named_parameters(), lr=0.0)
    opt.model = model if layerwise else None

    def closure():
        if not layerwise and opt is not None:
            assert not same(before, weights(model))
        return loss_of(model)

    for _ in range(3):
        opt.step(closure)
    assert same(before, weights(model))
    assert storage == {n: p.data_ptr() for n, p in model.named_parameters()}


def test_the_three_ways_agree():
    runs = []
    for mode, layerwise in (("scratch", True), ("scratch", False), ("in_place", False)):
        model = tangle(torch.float64)
        opt = build(f"mezo(mode='{mode}')", model.named_parameters(), lr=1e-2)
        opt.model = model if layerwise else None
        losses = [opt.step(lambda m=model: loss_of(m)) for _ in range(3)]
        runs.append((losses, weights(model)))
    for losses, w in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-9)
        for n in w:
            torch.testing.assert_close(w[n], runs[0][1][n], rtol=1e-6, atol=1e-8)


def test_a_module_at_a_time_keeps_one_module():
    """While scratch runs layer-wise, perturbed copies of at most one layer are alive."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    opt = build("mezo", model.named_parameters(), lr=0.0)
    opt.model = model
    real = {p: p.data_ptr() for p in model.parameters()}
    most, refs = [], []

    def spy(*_):
        away = [p for p in real if p.data_ptr() != real[p]]
        most.append(sum(p.numel() for p in away))
        refs.extend(weakref.ref(p.data) for p in away)

    for layer in model:
        layer.register_forward_hook(spy, prepend=True)
    opt.step(lambda: model(torch.ones(1, 16)).sum())
    assert most[:6] == [0] * 6                       # the first forward only looks on
    assert most[6:] == [16 * 16 + 16] * 12
    assert all(r() is None for r in refs)


def test_an_error_in_the_forward_puts_the_weights_back():
    for mode in ("scratch", "in_place"):
        model = tangle(torch.float64)
        before = weights(model)
        opt = build(f"mezo(mode='{mode}')", model.named_parameters(), lr=1.0)
        calls = []

        def closure(model=model, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("broken batch")
            return loss_of(model)

        with pytest.raises(ValueError, match="broken"):
            opt.step(closure)
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[n], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, measured", [(torch.float16, 0.005), (torch.bfloat16, 0.039)])
def test_in_place_drifts_as_measured(dtype, measured):
    """|w| ~ 0.02, eps 1e-3: after 100 steps 0.5 % of ||w|| in fp16 and 3.9 % in bf16."""
    g = torch.Generator().manual_seed(0)
    start = (torch.randn(4000, generator=g) * 0.02).to(dtype)
    p = nn.Parameter(start.clone())
    opt = build("mezo(mode='in_place')", [("w", p)], lr=0.0)
    opt.param_groups[0]["lr"] = 0.0
    losses = itertools.cycle([0.0, 1e-3])            # any two that differ
    for _ in range(100):
        opt.step(lambda: next(losses))
    drift = ((p.detach().double() - start.double()).norm() / start.double().norm()).item()
    assert measured / 2 < drift < measured * 2


# -- the log --------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["mezo(queries=2, weight_decay=0.01)", "mezo + master_weights",
                                    "mezo + kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_bit_for_bit(recipe, dtype):
    model = tangle(dtype)
    model.shared.weight.burnish_lr = 4.0
    opt = build(recipe, model.named_parameters(), lr=1e-3, seed=9)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 / (1 + i / 3))
    opt.model = model
    for _ in range(6):
        opt.step(lambda: loss_of(model))
        schedule.step()
    log = ScalarLog.from_tensors(load(save(opt.log.tensors())), opt.log.header)

    fresh = tangle(dtype)
    fresh.shared.weight.burnish_lr = 4.0
    again = build(recipe, fresh.named_parameters(), lr=1.0, seed=1)
    again.replay(log)                                # no data, no forward, no schedule
    assert same(weights(model), weights(fresh))
    with pytest.raises(FormatError, match="queries"):
        build("mezo(queries=3)", fresh.named_parameters(), 1.0).replay(log)
    del log.header["stream"]                         # written before streams had a number
    with pytest.raises(FormatError, match="stream=None"):
        build(recipe, fresh.named_parameters(), 1.0).replay(log)


def test_the_log_is_small():
    p = nn.Parameter(torch.zeros(4))
    opt = build("mezo", [("w", p)], lr=1e-6)
    for _ in range(50):
        opt.step(lambda: p.sum())
    assert sum(t.nbytes for t in opt.log.tensors().values()) == 16 * 50


@pytest.mark.parametrize("road", ["state_dict", "named"])
@pytest.mark.parametrize("recipe", ["mezo(queries=2)", "mezo + master_weights"])
def test_stop_and_resume_is_one_run_with_one_log(road, recipe):
    def steps(model, opt, n):
        for _ in range(n):
            opt.step(lambda: loss_of(model))
        return opt

    whole, first, second = (tangle(torch.bfloat16) for _ in range(3))
    one = steps(whole, build(recipe, whole.named_parameters(), 1e-3), 5)
    opt = steps(first, build(recipe, first.named_parameters(), 1e-3), 3)
    second.load_state_dict(first.state_dict())
    again = build(recipe, second.named_parameters(), 1e-3)
    if road == "state_dict":
        again.load_state_dict(opt.state_dict())
    else:
        load_named_state(again, *named_state(opt))
    steps(second, again, 2)
    assert same(weights(whole), weights(second)) and again.log == one.log
    fresh = tangle(torch.bfloat16)
    build(recipe, fresh.named_parameters(), 1e-3).replay(again.log)
    assert same(weights(whole), weights(fresh))


def test_the_log_of_a_later_part_starts_from_later_weights():
    model = tangle(torch.bfloat16)
    opt = build("mezo", model.named_parameters(), 1e-3)
    for _ in range(3):
        opt.step(lambda: loss_of(model))
    middle = tangle(torch.bfloat16)
    middle.load_state_dict(model.state_dict())
    opt.log = ScalarLog(header=opt.log.header)
    for _ in range(2):
        opt.step(lambda: loss_of(model))
    build("mezo", middle.named_parameters(), 1e-3).replay(opt.log)
    assert same(weights(model), weights(middle))


def test_a_failed_loss_moves_nothing_and_is_logged_as_zero():
    p = nn.Parameter(torch.ones(3))
    opt = build("mezo", [("w", p)], lr=1.0)
    opt.step(lambda: math.nan)
    assert torch.equal(p.detach(), torch.ones(3)) and opt.log.scalars == [0.0]


def test_small_bf16_updates_survive():
    """An update of 1e-6 z on weights of 0.02 vanishes under nearest rounding. Here every weight is
    a bf16 neighbour of the exact step, and the step is right on average: their sum along z is
    within five deviations of what independent draws with the exact shares would give."""
    start = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    kept = {}
    for recipe in ("mezo", "mezo + nearest"):
        p = nn.Parameter(start.clone())
        extra = [Rounding(kind="nearest")] if "nearest" in recipe else []
        opt = compose([*[m.optimizer() for m in parse("mezo")], *extra], [("w", p)], 1e-6)
        losses = iter([1e-3, -1e-3])                 # g = 1
        opt.step(lambda losses=losses: next(losses))
        z = CounterNoise(opt.log.seeds[0], "w").normal(20_000).double()
        kept[recipe] = p.detach().double()
    exact = start.double() - 1e-6 * z
    mantissa, exponent = torch.frexp(exact)
    low = torch.ldexp(torch.floor(mantissa * 256), exponent - 8)
    high = torch.ldexp(torch.ceil(mantissa * 256), exponent - 8)
    near = 1e-7 * exact.abs()
    got = kept["mezo"]
    assert (((got - low).abs() <= near) | ((got - high).abs() <= near)).all()
    share = ((exact - low) / (high - low)).clamp(0, 1)
    spread = (z.square() * (high - low).square() * share * (1 - share)).sum().sqrt()
    off = (got - exact) @ z
    assert abs(off) < 5 * spread and 5 * spread < 1e-6 * (z @ z), "and the step is five deviations"
    stays = (start.double() - kept["mezo + nearest"]).abs() > 0
    assert float(stays.double().mean()) < 0.02


@pytest.mark.parametrize("dtype, size, kept", [
    (torch.float16, 1e-5, 0.97), (torch.bfloat16, 1e-5, 0.28), (torch.float16, 1e-6, 0.23),
    (torch.bfloat16, 1e-6, 0.03)])
def test_what_rounding_to_nearest_keeps_of_an_update_is_as_measured(dtype, size, kept):
    """|w| ~ 0.02: the share of u z that is left along z."""
    start = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    p = nn.Parameter(start.clone())
    answers = [*[m.optimizer() for m in parse("mezo")], Rounding(kind="nearest")]
    opt = compose(answers, [("w", p)], 1.0)
    opt.replay(ScalarLog(dict(opt.log.header), [5], [1.0], [(size,)]))
    z = CounterNoise(5, "w").normal(200_000).double()
    moved = start.double() - p.detach().double()
    assert float(moved @ z / (size * (z @ z))) == pytest.approx(kept, abs=0.02)


# -- what it refuses, and the simulator ------------------------------------------------------
def test_what_has_no_meaning_is_refused_by_name():
    named = list(tangle().named_parameters())
    spec = [m.optimizer() for m in parse("mezo")]
    with pytest.raises(RecipeError, match="tuned.step"):
        compose(spec, named, 1e-3).step()
    with pytest.raises(RecipeError, match="mezo and galore.*gradient"):
        compose([*spec, Subspace(map=SubspaceMap(rank=2), name="galore")], named, 1e-3)
    with pytest.raises(RecipeError, match="mezo and step_in_backward"):
        compose([*spec, InBackward()], named, 1e-3)
    with pytest.raises(RecipeError, match="mezo and lion"):
        compose([*spec, Lion()], named, 1e-3)
    with pytest.raises(RecipeError, match="micro-batches"):
        compose(spec, named, 1e-3, accumulation=2)
    with pytest.raises(RecipeError, match="eps"):
        parse("mezo(eps=0.0)")[0].optimizer()


@pytest.mark.parametrize("mode", ["scratch", "in_place"])
def test_a_step_runs_on_fake_tensors(mode):
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 2))
        model[1] = nn.Linear(8, 2, dtype=torch.bfloat16)
        opt = build(f"mezo(mode='{mode}')", model.named_parameters(), 1e-3)
        opt.model = model
        x = torch.empty(3, 8, dtype=torch.bfloat16)
        for _ in range(2):
            opt.step(lambda: model(x).float().sum())
    assert len(opt.log) == 2


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("mezo")
    want = {"eps": 1e-3, "weight_decay": 0.0}
    assert {k: getattr(made, k) for k in want} == want


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert ZerothOrder() == parse("mezo")[0].optimizer()
