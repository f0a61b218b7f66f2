"""The zeroth-order zoo against its equations, dense and in float64, and what it keeps."""

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
from burnish.blocks.update.step import compose
from burnish.blocks.update.zoo import Zoo, unit_of
from burnish.core.errors import FormatError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64, LR, EPS, SEED = torch.float64, 2e-3, 1e-2, 3


def build(recipe, named, lr=LR, **kw):
    return compose([m.optimizer() for m in parse(recipe)], named, lr, **kw)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.5)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=F64)


def loss_at(model, theta=None):
    out = model(X) if theta is None else functional_call(model, theta, (X,))
    return (out - Y).square().mean()


def drive(settings, steps=6, seen=lambda opt, model: None, rates=lambda t: LR):
    model = Stack().double().eval()
    opt = build(f"zo(eps=1e-2{settings})", model.named_parameters(), seed=SEED)
    opt.model = model
    for t in range(steps):
        for group in opt.param_groups:
            group["lr"] = rates(t)
        opt.step(lambda: loss_at(model))
        seen(opt, model)
    return model, opt


UNITS = {"whole": lambda n: "", "module": lambda n: n.rpartition(".")[0],
         "block": lambda n: n.rpartition(".")[0]}            # the blocks here are modules


@torch.no_grad()
def reference(seeds, steps=6, rule="sgd", queries=1, one_sided=False, unit="whole", sparsity=0.0,
              resample=1, size="none", unbiased=True, weight_decay=0.0, size_seeds=(),
              mask="layer"):
    """Every equation of the docstring, over whole tensors."""
    model = Stack().double().eval()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    seeds, state = iter(seeds), {}
    border = torch.cat([p.flatten() for p in theta.values()]).abs().quantile(sparsity)
    share = {n: sparsity if mask == "layer" else float((p.abs() < border).double().mean())
             for n, p in theta.items()}

    def noise(seed, t):
        out = {}
        for n, p in theta.items():
            z = CounterNoise(seed, n).normal(p.numel()).double()
            if sparsity:
                u = CounterNoise(SEED, f"{n}/mask").uniform(p.numel(), turn=t // resample)
                z = z * (u >= share[n])
            out[n] = z.view(p.shape)
        return out

    def at(move):
        return float(loss_at(model, {n: p + move.get(n, 0.0) for n, p in theta.items()}))

    d = dict.fromkeys(theta, 1.0)
    groups = {}
    for n in theta:
        groups.setdefault(UNITS["block"](n), []).append(n)
    for k, names in enumerate(groups.values()) if size != "none" else ():
        if size == "weights":
            square = sum(float(theta[n].square().sum()) for n in names)
            found = math.sqrt(square / sum(theta[n].numel() for n in names))
        else:
            z = noise(size_seeds[k], 0)
            found = abs(at({n: EPS * z[n] for n in names}) - at({n: -EPS * z[n] for n in names}))
            found /= 2 * EPS
        d.update(dict.fromkeys(names, found))
    for t in range(steps):
        parts = {}
        for n in theta:
            parts.setdefault(UNITS[unit](n), []).append(n)
        for names in parts.values():
            G = {n: 0.0 for n in names}
            for _ in range(queries):
                z = noise(next(seeds), t)
                up = at({n: EPS * z[n] / d[n] for n in names})
                if one_sided:
                    g = (up - at({})) / EPS
                else:
                    g = (up - at({n: -EPS * z[n] / d[n] for n in names})) / (2 * EPS)
                g = g / queries if rule != "scalar" else float(g > 0) - float(g < 0)
                G = {n: G[n] + g * z[n] * (d[n] if unbiased else 1.0) for n in names}
            if rule == "cons":
                best = min((at({}), 0.0), (at({n: -LR * G[n] for n in names}), -1.0),
                           (at({n: LR * G[n] for n in names}), 1.0), key=lambda pair: pair[0])
                G = {n: -best[1] * G[n] for n in names}
            for n in names:
                u = G[n]
                if rule in ("momentum", "adam", "lion"):
                    m, v = state.get(n, (0.0, 0.0))
                    if rule == "momentum":
                        m = u = 0.9 * m + u
                    elif rule == "lion":
                        u, m = torch.sign(0.9 * m + 0.1 * u), 0.99 * m + 0.01 * u
                    else:
                        m, v = 0.9 * m + 0.1 * u, 0.999 * v + 0.001 * u**2
                        u = m / (1 - 0.9 ** (t + 1)) / (
                            (v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
                    state[n] = m, v
                elif rule == "sign":
                    u = u.sign()
                keep = 1 - LR * weight_decay if theta[n].dim() > 1 else 1.0
                theta[n] = theta[n] * keep - LR * u
    return theta


CASES = {
    "": {}, ", rule='momentum'": {"rule": "momentum"}, ", rule='sign'": {"rule": "sign"},
    ", rule='scalar'": {"rule": "scalar"}, ", rule='adam', weight_decay=0.3":
    {"rule": "adam", "weight_decay": 0.3}, ", rule='lion'": {"rule": "lion"},
    ", rule='cons'": {"rule": "cons"}, ", rule='adam', queries=3": {"rule": "adam", "queries": 3},
    ", rule='sign', queries=2, weight_decay=0.3":
    {"rule": "sign", "queries": 2, "weight_decay": 0.3},
    ", one_sided=True": {"one_sided": True}, ", one_sided=True, queries=2":
    {"one_sided": True, "queries": 2}, ", rule='cons', one_sided=True":
    {"rule": "cons", "one_sided": True},
    ", unit='block'": {"unit": "block"}, ", unit='module', queries=2, weight_decay=0.3":
    {"unit": "module", "queries": 2, "weight_decay": 0.3},
    ", unit='block', rule='momentum', one_sided=True":
    {"unit": "block", "rule": "momentum", "one_sided": True},
    ", s=0.4": {"sparsity": 0.4}, ", s=0.4, resample=2, rule='adam'":
    {"sparsity": 0.4, "resample": 2, "rule": "adam"},
    ", s=0.4, rule='cons'": {"sparsity": 0.4, "rule": "cons"},
    ", s=0.4, mask='global'": {"sparsity": 0.4, "mask": "global"},
    ", s=0.7, mask='global', resample=2, rule='adam'":
    {"sparsity": 0.7, "mask": "global", "resample": 2, "rule": "adam"},
    ", unit='block', s=0.4, resample=2": {"unit": "block", "sparsity": 0.4, "resample": 2},
    ", measure='weights'": {"size": "weights"}, ", measure='weights', unbiased=False":
    {"size": "weights", "unbiased": False}, ", measure='probe', unbiased=False":
    {"size": "probe", "unbiased": False},
    ", measure='weights', rule='adam', mode='in_place'": {"size": "weights", "rule": "adam"},
    ", one_sided=True, mode='in_place'": {"one_sided": True},
}


@pytest.mark.parametrize("settings", CASES)
def test_the_equations(settings):
    from burnish.blocks.update.noise import fold

    model, opt = drive(settings)
    sizes = [fold("size", SEED, k) & 0x7FFFFFFF for k in range(9)]
    want = reference(opt.log.seeds, size_seeds=sizes, **CASES[settings])
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[n], rtol=2e-4, atol=2e-6, msg=n)
    assert len(set(opt.log.seeds)) == len(opt.log.seeds)     # noise of its own, part by part


@pytest.mark.parametrize("settings", ["", ", mode='in_place'", ", noise='portable'"])
def test_plain_and_whole_it_is_mezo_bit_for_bit(settings):
    model, opt = drive(settings)
    other = Stack().double().eval()
    mezo = build(f"mezo(eps=1e-2{settings})", other.named_parameters(), seed=SEED)
    mezo.model = other
    for _ in range(6):
        mezo.step(lambda: loss_at(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(),
                                                 strict=True))


def test_one_part_alone_is_plain():
    """Parts of a model that has one: with the whole's noise it would be the whole."""
    p, q = (nn.Parameter(torch.ones(6, dtype=F64)) for _ in range(2))
    a = build("zo(unit='block', eps=1e-2)", [("layers.0.w", p)], seed=SEED)
    a.step(lambda: (p * torch.arange(6)).square().sum())
    b = build("mezo(eps=1e-2)", [("layers.0.w", q)], seed=SEED)
    b._seed = lambda update, query, unit: a.log.seeds[0]
    b.step(lambda: (q * torch.arange(6)).square().sum())
    assert torch.equal(p, q)


def test_a_conservative_step_never_makes_the_batch_s_loss_larger():
    losses = []
    drive(", rule='cons'", steps=25, seen=lambda opt, m: losses.append(loss_at(m).item()),
          rates=lambda t: 1.0 if t % 2 else 1e-2)            # steps far too long among them
    first = loss_at(Stack().double().eval()).item()
    assert all(b <= a for a, b in zip([first, *losses], losses, strict=False))
    assert len(set(losses)) > 3


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_mask_has_its_share_and_stays_for_its_time(sparsity):
    p = nn.Parameter(torch.zeros(40000))
    opt = build(f"zo(s={sparsity}, resample=2, eps=1.0)", [("w", p)], seed=SEED)
    moved = []
    for _ in range(4):
        before = p.detach().clone()
        opt.step(lambda: p.detach().sum())
        moved.append(p.detach() != before)
    for m in moved:
        share = 1 - float(m.float().mean())
        assert abs(share - sparsity) <= 3 * math.sqrt(sparsity * (1 - sparsity) / 40000)
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[2], moved[3])
    assert not torch.equal(moved[1], moved[2])


def test_by_all_weights_a_tensor_of_small_ones_has_more_zeros_and_shares_stay_what_they_were():
    small, large = nn.Parameter(torch.randn(20000) * 0.1), nn.Parameter(torch.randn(30000))
    with torch.no_grad():
        small[0] = 0.0                                   # zeros fall on any entry alike
    border = torch.cat([small, large]).detach().abs().quantile(0.5)
    want = [float((p.detach().abs() < border).float().mean()) for p in (small, large)]
    assert want[0] > 0.9 and 0.1 < want[1] < 0.4
    opt = build("zo(s=0.5, mask='global', eps=1.0)", [("a", small), ("b", large)], seed=SEED)
    for _ in range(3):
        before = [p.detach().clone() for p in (small, large)]
        opt.step(lambda: small.detach().sum() + large.detach().sum())
        for p, b, s in zip((small, large), before, want, strict=True):
            off = abs(float((p.detach() == b).float().mean()) - s)
            assert off <= 3 * math.sqrt(s * (1 - s) / len(p)) + 1e-4
        assert opt.log.header["shares"] == pytest.approx(dict(zip("ab", want, strict=True)))
        large.data.mul_(100)
    with pytest.raises(RecipeError, match="no share of zeros to deal out"):
        parse("zo(mask='global')")


@pytest.mark.parametrize("unbiased", [True, False])
def test_by_size_the_mean_is_the_gradient_or_one_divided_by_its_block_s(unbiased):
    n, wa, wb = 4000, torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([3.0], dtype=F64)
    a, b = nn.Parameter(torch.full((2,), 0.5, dtype=F64)), nn.Parameter(torch.full((1,), 4.0,
                                                                                   dtype=F64))
    opt = build(f"zo(measure='weights', unbiased={unbiased})",
                [("layers.0.w", a), ("layers.1.w", b)], lr=1.0)
    total = torch.zeros(3, dtype=F64)
    for _ in range(n):
        opt.step(lambda: wa @ a + wb @ b)
        total += torch.cat([0.5 - a.detach(), 4.0 - b.detach()])
        a.data.fill_(0.5)
        b.data.fill_(4.0)
    want = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    if not unbiased:
        want = want / torch.tensor([0.5, 0.5, 4.0], dtype=F64)
    spread = 5 * (8.0 if unbiased else 1.0) * (want.norm() + 4) / math.sqrt(n)
    assert (total / n - want).norm() < spread


@pytest.mark.parametrize("rule, count", [("sgd", 0), ("momentum", 1), ("sign", 0), ("scalar", 0),
                                         ("adam", 2), ("lion", 1), ("cons", 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_what_is_kept_is_what_it_says(rule, count, dtype):
    p = nn.Parameter(torch.ones(6, 8, dtype=dtype))
    opt = build(f"zo(rule={rule!r}, eps=1e-1)", [("w", p)])
    opt.step(lambda: p.detach().float().square().sum())
    held = sum(v.nbytes for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor))
    size = max(4, dtype.itemsize)
    assert held == count * 48 * size
    assert parse(f"zo(rule={rule!r})")[0].state_bytes((6, 8), dtype.itemsize) == held


REPLAYED = [", rule='adam', queries=2", ", rule='cons'", ", unit='block', s=0.3",
            ", s=0.5, mask='global', measure='weights'", ", measure='probe', rule='adam'",
            ", rule='scalar', one_sided=True"]


@pytest.mark.parametrize("settings", REPLAYED)
def test_the_log_repeats_the_run(settings):
    model, opt = drive(settings, rates=lambda t: LR / (1 + t))
    fresh = Stack().double()
    again = build(f"zo(eps=1e-2{settings})", fresh.named_parameters(), seed=SEED + 1)
    again.replay(copy.deepcopy(opt.log))             # masks are of the seed that stands in it
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(),
                                                 strict=True))
    assert again.param_groups[0]["updates"] == 6
    for other in (", rule='adam'", ", s=0.9"):
        with pytest.raises(FormatError, match="the log was written with"):
            build(f"zo(eps=1e-2{other})", fresh.named_parameters(), seed=SEED).replay(opt.log)


@pytest.mark.parametrize("settings", [", measure='weights'", ", s=0.5, mask='global'"])
def test_a_log_that_is_refused_leaves_sizes_masks_and_seed_as_they_were(settings):
    _, other = drive(f", queries=2{settings}")
    other.log.header.update({k: {n: 9.0 for n in other.log.header[k]}
                             for k in ("factors", "shares") if k in other.log.header}, seed=99)
    ends = []
    for refused in (False, True):
        model = Stack().double().eval()
        opt = build(f"zo(eps=1e-2{settings})", model.named_parameters(), seed=SEED)
        if refused:
            with pytest.raises(FormatError, match="the log was written with queries=2"):
                opt.replay(other.log)
        opt.model = model
        opt.step(lambda model=model: loss_at(model))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    log = drive(settings)[1].log                     # one that has stepped takes another run's
    again = Stack().double()
    opt = build(f"zo(eps=1e-2{settings})", again.named_parameters(), seed=SEED)
    opt.model = again
    with torch.no_grad():
        for k, p in enumerate(again.parameters()):
            p.mul_(1 + 3 * k)                        # which has other sizes
    opt.step(lambda: loss_at(again))
    with torch.no_grad():
        for p, q in zip(again.parameters(), Stack().double().parameters(), strict=True):
            p.copy_(q)
    opt.replay(log)
    assert all(torch.equal(a, b) for a, b in zip(
        again.parameters(), drive(settings)[0].parameters(), strict=True))


@pytest.mark.parametrize("road", ["named", "state_dict"])
@pytest.mark.parametrize("settings", REPLAYED)
def test_a_resumed_run_is_bit_for_bit_the_same(settings, road):
    whole, _ = drive(settings)
    first, opt = drive(settings, steps=2)
    second = Stack().double().eval()
    second.load_state_dict(first.state_dict())
    again = build(f"zo(eps=1e-2{settings})", second.named_parameters(), seed=SEED)
    if road == "named":
        load_named_state(again, *named_state(opt))
    else:
        again.load_state_dict(opt.state_dict())
    again.model = second
    for _ in range(4):
        again.step(lambda: loss_at(second))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(),
                                                 strict=True))


def test_the_size_of_one_weight_and_of_a_block_at_rest():
    """A block of one weight has that weight's size; of one that rests nothing is measured."""
    a, b = (nn.Parameter(torch.full((1,), x, dtype=F64)) for x in (0.25, 4.0))
    b.requires_grad_(False)
    opt = build("zo(measure='weights', eps=1e-2)", [("layers.0.w", a), ("layers.1.w", b)])
    opt.step(lambda: a.sum() + b.sum())
    assert opt.log.header["factors"] == {"layers.0.w": 0.25, "layers.1.w": 1.0}


def test_a_log_says_what_its_rule_reads():
    p = nn.Parameter(torch.ones(3))
    opt = build("zo(rule='adam', weight_decay=0.1)", [("w", p)])
    assert opt.log.header["rule"] == ["adamw", {"betas": [0.9, 0.999], "eps": 1e-8,
                                                "eps_first": False}]
    assert opt.log.header["weight_decay"] == [0.1]


def test_a_probe_of_sizes_that_breaks_off_leaves_all_alive():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = build("zo(measure='probe')", [("layers.0.w", p), ("layers.1.w", q)])

    def broken():
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        opt.step(broken)
    assert [n for n, _ in opt.named()] == ["layers.0.w", "layers.1.w"]


def test_a_step_that_breaks_off_leaves_no_loss_behind():
    """One-sided: the loss at theta is that of the batch at hand, not of one that failed."""
    p = nn.Parameter(torch.zeros(4))
    opt = build("zo(one_sided=True, eps=1.0)", [("w", p)])
    losses = iter([5.0])
    with pytest.raises(StopIteration):
        opt.step(lambda: next(losses))
    losses = iter([1.0, 4.0])
    opt.step(lambda: next(losses))
    assert opt.log.scalars == [3.0]


def test_what_rests_is_neither_probed_nor_moved():
    for settings in (", unit='block'", ", rule='adam'", ""):
        model = Stack().double().eval()
        opt = build(f"zo(eps=1e-2{settings})", model.named_parameters(), seed=SEED)
        before = copy.deepcopy(model.state_dict())
        for n, p in model.named_parameters():
            p.requires_grad_(not n.startswith("layers.1."))
        for _ in range(3):
            opt.step(lambda model=model: loss_at(model))
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == n.startswith("layers.1.")


@pytest.mark.parametrize("name, block, module", [
    ("model.layers.3.self_attn.q_proj.weight", ".model.layers.3",
     "model.layers.3.self_attn.q_proj"),
    ("model.embed.weight", "model.embed", "model.embed"), ("w", "", "")])
def test_units(name, block, module):
    assert unit_of(name, "block") == block and unit_of(name, "module") == module


@pytest.mark.parametrize("settings", ["rule='adam'", "rule='cons'", "unit='block'",
                                      "s=0.5, measure='weights', queries=2"])
def test_on_a_model_the_loss_falls(settings):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"full + zo({settings})", head=False)
    tuned.optimizer(lr=1e-3)
    losses = [float(tuned.step(batch)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_what_cannot_act_is_refused():
    for settings in ("rule='cons', queries=2", "rule='cons', unit='block'",
                     "rule='cons', mode='in_place'", "rule='cons', weight_decay=0.1",
                     "rule='cons', measure='weights'"):
        with pytest.raises(RecipeError, match="a conservative step compares three points"):
            parse(f"full + zo({settings})")[1].optimizer()
    with pytest.raises(RecipeError, match="zo: sparsity is a share below 1"):
        parse("zo(s=1.0)")[0].optimizer()
    with pytest.raises(RecipeError, match="resample at least 1"):
        parse("zo(s=0.5, resample=0)")[0].optimizer()
    with pytest.raises(RecipeError, match="take measure='weights' or 'probe'"):
        parse("zo(unbiased=False)")
    with pytest.raises(RecipeError, match="resample has no mask"):
        parse("zo(resample=5)")
    with pytest.raises(RecipeError, match="zo: eps is positive"):
        parse("zo(eps=0.0)")[0].optimizer()
    p = nn.Parameter(torch.ones(2))
    q = nn.Parameter(torch.ones(2))
    q.burnish_lr = 2.0
    opt = build("zo(rule='cons', eps=0.1)", [("a", p), ("b", q)])
    with pytest.raises(RecipeError, match="has one learning rate, and here are 2"):
        opt.step(lambda: (p * q).sum())


def test_its_settings_are_the_benchmark_s():
    (made,) = parse("zo")
    want = {"rule": "sgd", "eps": 1e-3, "queries": 1, "one_sided": False, "s": 0.0,
            "resample": 1}
    assert {k: getattr(made, k) for k in want} == want


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert Zoo() == parse("zo")[0].optimizer()
