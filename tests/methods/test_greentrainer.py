"""GreenTrainer against its equations in plain fp64 torch, and what a choice must leave alone."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.reach import Cost, costs, within
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import Ledger, MemoryReport, measure, simulate
from burnish.methods.controller import greentrainer
from burnish.testing.models import tiny

LR = 1e-2


def mse(out, batch):
    return (out - batch[1]).square().mean()


class Net(nn.Module):
    """Six linears with a dropout between them."""

    def __init__(self, p=0.0, width=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.drop = nn.Dropout(p)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.drop(torch.tanh(layer(x)))
        return x


def start(p=0.0, dtype=torch.float64, width=12):
    torch.manual_seed(0)
    net = Net(p, width).to(dtype)
    g = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randn(5, width, generator=g).to(dtype) for _ in range(2))
               for _ in range(8)]
    return net, batches


def handler(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "greentrainer")


def live(tuned):
    return {n for n, _ in tuned.named_parameters()}


# -- the choice --------------------------------------------------------------------------------
def price(listed, chosen):
    """sum_k (max_{j >= k} m_j) t_dy[k] + m_k t_dw[k], as the paper writes it."""
    m = [c.name in chosen for c in listed]
    return sum(any(m[k:]) * c.way + m[k] * c.own for k, c in enumerate(listed))


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_the_best_of_all(seed):
    draw = random.Random(seed)
    listed = [Cost(str(k), draw.choice([0.0, draw.uniform(0, 5)]), draw.uniform(0.1, 5))
              for k in range(draw.randint(1, 11))]
    worth = {c.name: draw.uniform(-0.3, 1) for c in listed}
    budget = draw.uniform(0.3, 1) * price(listed, set(worth))
    got = within(listed, worth, budget)
    every = [set(s) for n in range(len(listed) + 1)
             for s in itertools.combinations([c.name for c in listed], n)]
    best = max(sum(worth[n] for n in s) for s in every if price(listed, s) <= budget)
    if best > 0:
        assert price(listed, got) <= budget * (1 + 1e-12)
        assert sum(worth[n] for n in got) == pytest.approx(best, rel=1e-12)


def test_a_long_list_keeps_the_budget_and_is_nearly_the_best():
    draw = random.Random(0)
    listed = [Cost(str(k), draw.uniform(0, 5), draw.uniform(0.1, 5)) for k in range(300)]
    worth = {c.name: draw.uniform(0, 1) for c in listed}
    budget = 0.4 * price(listed, set(worth))
    got = within(listed, worth, budget)
    assert price(listed, got) <= budget
    bounds, way = [], 0.0                     # of each depth, with a last tensor cut in two
    for k, c in enumerate(listed):
        way += c.way
        room, total = budget - way, 0.0
        for d in sorted(listed[:k + 1], key=lambda d: -worth[d.name] / d.own):
            take = min(1.0, max(0.0, room / d.own))
            total, room = total + take * worth[d.name], room - take * d.own
        bounds.append(total if room >= 0 else 0.0)
    assert sum(worth[n] for n in got) >= 0.99 * max(bounds)


def test_something_trains_even_where_nothing_fits():
    listed = [Cost("a", 0.0, 9.0), Cost("b", 1.0, 3.0), Cost("c", 5.0, 1.0)]
    assert within(listed, {"a": 1.0, "b": 1.0, "c": 1.0}, 2.0) == {"b"}
    assert within(listed, {"a": -1.0, "b": 0.0, "c": -1.0}, 100.0) == {"b"}


# -- the whole equation -------------------------------------------------------------------------
def chain(sizes):
    """Linears without a bias, so that every FLOP can be counted by hand."""
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double()
    g = torch.Generator().manual_seed(3)
    return net, (torch.randn(5, sizes[0], generator=g).double(),
                 torch.randn(5, sizes[-1], generator=g).double())


def by_hand(sizes, worth, rho, n=5):
    """(the best choice among all, T_bp): 2 n in out of each product, for n rows; the deepest
    layer hands no gradient on."""
    products = [2 * n * a * b for a, b in itertools.pairwise(sizes)][::-1]
    names = [f"{2 * k}.weight" for k in range(len(products))][::-1]
    listed = [Cost(name, products[k - 1] if k else 0, own)
              for k, (name, own) in enumerate(zip(names, products, strict=True))]
    T_fp, T_bp = sum(products), sum(products) + sum(products[:-1])
    share = max(0.05, rho * (1 + T_fp / T_bp) - T_fp / T_bp)
    fits = [set(c) for k in range(1, len(names) + 1) for c in itertools.combinations(names, k)
            if price(listed, c) <= share * T_bp]
    return max(fits, key=lambda c: sum(worth[name] for name in c))


def told(monkeypatch, worth):
    monkeypatch.setattr(greentrainer, "relieved", lambda step, tensors: dict(worth))


@pytest.mark.parametrize("rho", [0.5, 0.62, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_trains_is_the_best_of_all_within_the_budget(rho, seed, monkeypatch):
    sizes, draw = (6, 8, 5, 7, 3), random.Random(seed)
    net, batch = chain(sizes)
    worth = {n: draw.uniform(0.2, 1) for n, _ in net.named_parameters()}
    told(monkeypatch, worth)
    tuned = burnish.tune(net, f"greentrainer(budget={rho}) + sgd", head=False)
    tuned.optimizer(LR)
    tuned.step(batch, mse)
    assert live(tuned) == by_hand(sizes, worth, rho)


def test_a_budget_below_the_forward_leaves_a_twentieth_of_backward(monkeypatch):
    """Of 8,820 FLOPs 441: the last two take 280, the third from the end 810 with its way."""
    sizes = (24, 30, 2, 7, 1)
    net, batch = chain(sizes)
    worth = {"0.weight": 9.0, "2.weight": 5.0, "4.weight": 1.0, "6.weight": 1.0}
    told(monkeypatch, worth)
    tuned = burnish.tune(net, "greentrainer(budget=0.1) + sgd", head=False)
    tuned.optimizer(LR)
    tuned.step(batch, mse)
    assert live(tuned) == {"4.weight", "6.weight"} == by_hand(sizes, worth, 0.1)


def test_only_a_rehearsed_choice_is_the_largest_and_only_once(monkeypatch):
    sizes = (6, 8, 5, 7, 3)
    net, batch = chain(sizes)
    worth = {"0.weight": 0.1, "2.weight": 0.1, "4.weight": 0.1, "6.weight": 1.0}
    entries = {n: p.numel() for n, p in net.named_parameters()}
    told(monkeypatch, worth)
    tuned = burnish.tune(net, "greentrainer(budget=0.7, every=1) + sgd", head=False)
    tuned.optimizer(LR)
    best, largest = by_hand(sizes, worth, 0.7), by_hand(sizes, entries, 0.7)
    assert best != largest
    seen = []
    for rehearsed in (False, True, False):
        if rehearsed:
            handler(tuned).rehearse(0)
        tuned.step(batch, mse)
        seen.append(live(tuned))
    assert seen == [best, largest, best]


def test_a_resumed_run_goes_on_with_its_choice_and_chooses_when_it_is_time(monkeypatch):
    sizes = (6, 8, 5, 7, 3)
    early = {"0.weight": 0.1, "2.weight": 1.0, "4.weight": 0.1, "6.weight": 0.1}
    late = {"0.weight": 0.1, "2.weight": 0.1, "4.weight": 1.0, "6.weight": 0.1}
    net, batch = chain(sizes)
    told(monkeypatch, early)
    tuned = burnish.tune(net, "greentrainer(budget=0.7, every=3) + sgd", head=False)
    tuned.optimizer(LR)
    for _ in range(2):
        tuned.step(batch, mse)
    state = tuned.timeline.state()

    net, batch = chain(sizes)
    told(monkeypatch, late)
    again = burnish.tune(net, "greentrainer(budget=0.7, every=3) + sgd", head=False)
    again.optimizer(LR)
    again.timeline.load(state)
    seen = [live(again)]
    for _ in range(2):
        again.step(batch, mse)
        seen.append(live(again))
    first, then = by_hand(sizes, early, 0.7), by_hand(sizes, late, 0.7)
    assert then not in (first, by_hand(sizes, {n: p.numel() for n, p in net.named_parameters()},
                                       0.7)), "neither the old choice nor the largest"
    assert seen == [first, first, then]


def test_a_tensor_that_leaves_the_choice_loses_its_moments(monkeypatch):
    sizes = (6, 8, 5, 7, 3)
    net, batch = chain(sizes)
    tuned = burnish.tune(net, "greentrainer(budget=0.7, every=1) + adamw", head=False)
    opt = tuned.optimizer(LR)
    met = []
    for best in ("4.weight", "2.weight", "6.weight"):
        told(monkeypatch, {n: 1.0 if n == best else 0.01 for n, _ in net.named_parameters()})
        tuned.step(batch, mse)
        met.append({n for n, p in net.named_parameters() if p in opt.state})
        assert met[-1] == live(tuned)
    assert met[0] - met[1] and met[1] - met[2]


def test_a_choice_takes_a_forward_and_two_passes():
    net, batches = start()
    passes = {"forward": 0, "backward": 0}

    def count(word):
        passes[word] += 1

    def loss(out, batch):
        value = mse(out, batch)
        if value.requires_grad:
            value.register_hook(lambda g: count("backward"))
        return value

    net.register_forward_hook(lambda *_: count("forward"))
    tuned = burnish.tune(net, "greentrainer(budget=1.0) + sgd", head=False)
    tuned.optimizer(LR)
    tuned.step(batches[0], loss)
    assert passes == {"forward": 4, "backward": 3}                # and the step's own
    tuned.step(batches[1], loss)
    assert passes == {"forward": 5, "backward": 4}


def test_whole_numbers_are_left_alone():
    net, batches = start()
    net.table = nn.Parameter(torch.arange(4), requires_grad=False)
    tuned = burnish.tune(net, "greentrainer(budget=1.0) + sgd", head=False)
    tuned.optimizer(LR)
    tuned.step(batches[0], mse)
    assert not net.table.requires_grad and "table" not in live(tuned)


def test_it_stands_outside_of_whatever_else_surrounds_a_pass():
    for text in ("greentrainer + sam", "sam + greentrainer"):
        tuned = burnish.tune(start()[0], text, head=False)
        tuned.optimizer(LR)
        assert tuned.timeline.around()[0] is handler(tuned)


# -- what things cost ----------------------------------------------------------------------------
def test_costs_are_the_products_of_the_layers():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8),
                          nn.Linear(8, 3, bias=False))
    ids = torch.randint(11, (4, 5))
    n = 20
    got, forward = costs(model, dict(model.named_parameters()), lambda: model(ids))
    want = {"3.weight": (0, 2 * n * 24), "2.weight": (2 * n * 24, n * 8), "2.bias": (0, n * 8),
            "1.weight": (2 * n * 8, 2 * n * 48), "1.bias": (0, n * 8),
            "0.weight": (2 * n * 48 + n * 8, n * 6)}
    assert {c.name: (c.way, c.own) for c in got} == want
    assert forward == 2 * n * 24 + 2 * n * 8 + 2 * n * 48 + n * 8 + n * 6


def test_convolutions_count_places_and_tied_weights_both_uses():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
    got, _ = costs(conv, dict(conv.named_parameters()), lambda: conv(torch.randn(2, 3, 5, 5)))
    assert got == [Cost("0.weight", 0.0, 2 * 50 * 108)]
    tied = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6, bias=False),
                         nn.Linear(6, 7, bias=False))
    tied[2].weight = tied[0].weight
    got, _ = costs(tied, dict(tied.named_parameters()), lambda: tied(torch.randint(7, (3,))))
    assert [c.name for c in got] == ["1.weight", "0.weight"]           # it is complete at the input
    assert got[1].own == 3 * 6 + 2 * 3 * 42


# -- the worth ---------------------------------------------------------------------------------
@pytest.mark.parametrize("rule, make", [
    ("", lambda ps: torch.optim.AdamW(ps, LR)),
    ("sgd(momentum=0.9)", lambda ps: torch.optim.SGD(ps, LR, momentum=0.9))])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_worth_is_what_one_update_takes_away(rule, make, p, monkeypatch):
    net, batches = start(p)
    recipe = " + ".join(filter(None, ["greentrainer(budget=1.0, every=1)", rule]))
    tuned = burnish.tune(net, recipe, head=False)
    tuned.optimizer(LR)
    found = {}
    real = greentrainer.relieved
    monkeypatch.setattr(greentrainer, "relieved",
                        lambda step, tensors: found.setdefault("I", real(step, tensors)))
    twin = copy.deepcopy(net)
    torch.manual_seed(9)
    tuned.step(batches[0], mse)

    own = list(start()[0].named_parameters())
    plain = Net(p).double()
    plain.load_state_dict({n: dict(twin.named_parameters())[n] for n, _ in own})
    opt = make(plain.parameters())
    before = [q.detach().clone() for q in plain.parameters()]
    torch.manual_seed(9)
    mse(plain(batches[0][0]), batches[0]).backward()
    opt.step()
    torch.manual_seed(9)
    g1 = torch.autograd.grad(mse(plain(batches[0][0]), batches[0]), list(plain.parameters()))
    worth = [-float((g * (q.detach() - w)).sum())
             for g, q, w in zip(g1, plain.parameters(), before, strict=True)]
    top = max(map(abs, worth))
    assert found["I"].keys() == {n for n, _ in own}
    for (name, _), w in zip(own, worth, strict=True):
        assert found["I"][name] == pytest.approx(w / top, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("extra", ["", " + adam8bit", " + kahan", " + sgd(momentum=0.9)"])
def test_a_choice_moves_no_weight_no_moment_no_random_number(extra, monkeypatch):
    from burnish.methods.controller.greentrainer import Chosen
    net, batches = start(0.3, torch.float32 if "kahan" not in extra else torch.bfloat16, width=80)
    tuned = burnish.tune(net, f"greentrainer(budget=0.6, every=2){extra}", head=False)
    opt = tuned.optimizer(LR)
    looked = []

    def everything():
        return ({n: v.clone() for n, v in net.state_dict().items()},
                {n: {k: v.clone() if torch.is_tensor(v) else v for k, v in opt.state[q].items()}
                 for n, q in net.named_parameters() if q in opt.state},
                torch.get_rng_state(), [g["lr"] for g in opt.param_groups],
                [q.grad for q in net.parameters()], tuned.timeline.step)

    real = Chosen.choose

    def choose(self, step):
        before = everything()
        made = real(self, step)
        after = everything()
        for a, b in zip(before[:2], after[:2], strict=True):
            assert a.keys() == b.keys()
        assert all(torch.equal(v, after[0][n]) for n, v in before[0].items())
        for n, state in before[1].items():
            assert state.keys() == after[1][n].keys()
            assert all(torch.equal(v, after[1][n][k]) if torch.is_tensor(v)
                       else v == after[1][n][k] for k, v in state.items())
        assert torch.equal(before[2], after[2]) and before[3:] == after[3:]
        looked.append(step.index)
        return made

    monkeypatch.setattr(Chosen, "choose", choose)
    for b in batches[:5]:
        tuned.step(b, mse)
    assert looked == [0, 2, 4]


# -- what it saves -------------------------------------------------------------------------------
def flops(tuned, batch):
    with Ledger(tuned.model, count=True) as ledger:
        tuned.step(batch, mse)
    return sum(ledger.flops.values())


def test_a_step_between_choices_has_the_flops_it_was_given():
    """A share rho of a full step, counted by the ledger on the real step."""
    net, batches = start(dtype=torch.float32, width=64)
    full = burnish.tune(copy.deepcopy(net), "full", head=False)
    full.optimizer(LR)
    full.step(batches[0], mse)
    whole = flops(full, batches[1])
    for rho in (0.45, 0.6, 0.8):
        tuned = burnish.tune(copy.deepcopy(net), f"greentrainer(budget={rho})", head=False)
        tuned.optimizer(1e-4)                        # small enough that each tensor is of worth
        tuned.step(batches[0], mse)
        share = flops(tuned, batches[1]) / whole
        assert rho - 0.15 < share <= rho + 0.02, (rho, share)


def test_what_is_not_chosen_has_no_gradient_no_state_and_does_not_move():
    net, batches = start()
    tuned = burnish.tune(net, "greentrainer(budget=0.5, every=3)", head=False)
    opt = tuned.optimizer(LR)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert live(tuned) == set(before)
    for b in batches[:3]:
        tuned.step(b, mse)
    chosen = live(tuned)
    assert 0 < len(chosen) < len(before)
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]) == (n not in chosen), n
        assert (p.grad is not None) == (p in opt.state) == (n in chosen), n


def test_a_choice_comes_once_an_update_and_period_whatever_the_micro_batches(monkeypatch):
    from burnish.methods.controller.greentrainer import Chosen
    seen = []
    real = Chosen.choose
    monkeypatch.setattr(Chosen, "choose", lambda self, step: seen.append(step.index)
                        or real(self, step))
    net, batches = start()
    tuned = burnish.tune(net, "greentrainer(every=2)", head=False)
    opt = tuned.optimizer(LR, accumulation=2)
    for k in range(4):
        opt.zero_grad()
        for b in batches[2 * k: 2 * k + 2]:
            tuned.backward(b, mse, scale=0.5)
        opt.step()
    assert seen == [0, 2]


def test_each_choice_is_among_all_tensors(monkeypatch):
    seen = []
    real = greentrainer.relieved

    def worth(step, tensors):
        seen.append(real(step, tensors))
        return seen[-1]

    monkeypatch.setattr(greentrainer, "relieved", worth)
    net, batches = start()
    tuned = burnish.tune(net, "greentrainer(budget=0.5, every=1)", head=False)
    tuned.optimizer(LR)
    for b in batches[:3]:
        tuned.step(b, mse)
    names = {n for n, _ in net.named_parameters()}
    assert [set(found) for found in seen] == [names] * 3 and len(live(tuned)) < len(names)


def test_a_warm_up_that_begins_at_no_rate_does_not_blind_the_choice():
    chosen = []
    for warm in (False, True):
        net, batches = start()
        tuned = burnish.tune(net, "greentrainer(budget=0.6)", head=False)
        opt = tuned.optimizer(LR)
        if warm:
            torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 10))
            assert opt.param_groups[0]["lr"] == 0
        tuned.step(batches[0], mse)
        chosen.append(live(tuned))
    assert chosen[0] == chosen[1] and len(chosen[0]) > 1


def test_a_second_optimizer_chooses_among_all_again():
    net, batches = start()
    tuned = burnish.tune(net, "greentrainer(budget=0.5)", head=False)
    tuned.optimizer(LR)
    tuned.step(batches[0], mse)
    tuned.optimizer(LR)
    assert live(tuned) == {n for n, _ in net.named_parameters()}


def test_beside_sam_a_checkpoint_and_an_adapter():
    model, batch = tiny("llama")
    tuned = burnish.tune(model, "greentrainer(budget=0.7, every=2) + lora(rank=4) + sam + "
                                "checkpoint", targets="q_proj,v_proj")
    tuned.optimizer(5e-3)
    losses = [float(tuned.step(batch)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert len(live(tuned)) < len(list(model.parameters()))


@pytest.mark.parametrize("recipe", ["greentrainer(budget=0.7)", "greentrainer + adam8bit",
                                    "greentrainer(budget=0.6) + checkpoint"])
@pytest.mark.parametrize("model", ["vit", "llama"])
def test_the_promise_covers_a_choice(recipe, model):
    """Which tensors are chosen depends on values, so the promise and the reading are of the largest
    choice; a run's own choices take no more, choosing included."""
    net, batch = tiny(model)
    promised = simulate(net, recipe, batch).peak_bytes
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(5e-3)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert promised == pytest.approx(measure(tuned, batch).peak_bytes, rel=0.005)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert live(tuned) == set(before)
    ledger = Ledger(net)
    ledger.watch("activations", batch)
    with ledger:
        for _ in range(3):
            handler(tuned).at = None                 # a choice at every step
            tuned.step(batch)
    assert MemoryReport.of(ledger).peak_bytes <= promised * 1.03


# -- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize("other", ["mezo", "step_in_backward", "lisa(layers=1)"])
def test_what_it_cannot_stand_beside_is_refused_when_the_recipe_is_read(other):
    for text in (f"greentrainer + {other}", f"{other} + greentrainer"):
        with pytest.raises(RecipeError, match="greentrainer"):
            parse(text)


@pytest.mark.parametrize("kw", [{"budget": 0.0}, {"budget": 1.1}, {"every": 0}])
def test_settings_have_bounds(kw):
    with pytest.raises(RecipeError, match="greentrainer: budget"):
        burnish.core.registry.find("greentrainer")(**kw)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    tuned = burnish.tune(start()[0], "greentrainer", head=False)
    with pytest.raises(ConfigError, match="use one process"):
        tuned.optimizer(LR)


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("greentrainer")
    want = {"budget": 0.5, "every": 100}
    assert {k: getattr(made, k) for k in want} == want
