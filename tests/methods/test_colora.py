"""CoLoRA: contributions along a straight line, the ranks they buy, and the weights put back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import burnish
from burnish.blocks.choose.attribution import Contribution, ranks_to
from burnish.blocks.weight.factor import Chain
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, DataError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.methods.delta.rank.colora import ranks
from burnish.testing import stir, tiny


class Net(nn.Module):
    """A convolution, a depthwise one, a norm and a linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x, labels):
        h = self.norm(self.deep(torch.relu(self.conv(x)))).tanh().mean((2, 3))
        out = self.fc(h)
        return {"loss": F.mse_loss(out, labels), "logits": out}


def data(n=3, size=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(size, 3, 6, 6, generator=g, dtype=torch.float64),
             "labels": torch.randn(size, 8, generator=g, dtype=torch.float64)} for _ in range(n)]


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def attributed(model, batches, steps, lr, points, names):
    """delta of each weight, by hand: Adam, then gradients sample by sample along the line."""
    model = copy.deepcopy(model).eval()
    start = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for i in range(steps):
        opt.zero_grad()
        model(**batches[i % len(batches)])["loss"].backward()
        opt.step()
    way = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
    total, count = dict.fromkeys(names, 0.0), 0
    for t in range(1, points + 1):
        with torch.no_grad():
            for p, s, w in zip(model.parameters(), start, way, strict=True):
                p.copy_(s + w * t / points)
        for batch in batches:
            for k in range(len(batch["x"])):
                opt.zero_grad()
                model(**{n: v[k : k + 1] for n, v in batch.items()})["loss"].backward()
                count += 1
                for (n, p), w in zip(model.named_parameters(), way, strict=True):
                    if n in total:
                        total[n] += float((w * p.grad).abs().flatten(1).sum(1).mean())
    return {n: v / count for n, v in total.items()}


def settled(tuned):
    return tuned.adapters["default"].settled["colora"]


NAMES = ("conv.weight", "fc.weight")


@pytest.mark.parametrize("steps, points, lr", [(4, 3, 0.01), (2, 5, 0.05)])
def test_contributions_are_those_of_the_equation(steps, points, lr):
    model, batches = net(), data()
    want = attributed(model, batches, steps, lr, points, NAMES)
    tuned = burnish.tune(
        model, f"colora(steps={steps}, points={points}, lr={lr}, budget=0.4, even=0.3)",
        targets="all", head=False, calibration=batches)
    got = settled(tuned)
    assert set(got) == set(NAMES)
    for n in NAMES:
        assert got[n]["contribution"] == pytest.approx(want[n] / sum(want.values()), rel=1e-9)
    places = {p.name: p for p in match(Anatomy.of(net()), "all")}
    mean = sum(want.values()) / 2
    assert [got[n]["rank"] for n in NAMES] == ranks(
        [places[n] for n in NAMES], 0.4, [0.3 + 0.7 * want[n] / mean for n in NAMES])
    assert {n: t.A.shape[0] for n, t in tuned.terms(Chain)} == {n: got[n]["rank"] for n in NAMES}


def test_whole_numbers_among_the_parameters_stay_out_of_it():
    model = net()
    model.steps = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
    recipe = "colora(steps=2, points=1, lr=0.01, budget=0.4, rest=False)"
    tuned = burnish.tune(model, recipe, targets="fc", head=False, calibration=data())
    assert model.steps.tolist() == [3, 4] and "fc.weight" in settled(tuned)


def test_so_many_samples_are_read_and_no_more():
    batches = data()
    few = attributed(net(), [{k: v[:1] for k, v in batches[0].items()}], 3, 0.01, 2, NAMES)
    tuned = burnish.tune(net(), "colora(steps=3, points=2, lr=0.01, budget=0.4, samples=1)",
                         targets="all", head=False, calibration=batches)
    share = settled(tuned)["fc.weight"]["contribution"]
    assert share == pytest.approx(few["fc.weight"] / sum(few.values()), rel=1e-9)


def test_every_bit_is_back_where_it_was_whatever_happens():
    model = net()
    model.conv.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    recipe = "colora(steps=3, points=2, lr=0.01, budget=0.4, rest=False)"
    tuned = burnish.tune(model, recipe, targets="all", head=False, calibration=data())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters())
    tuned.detach()
    assert [p.requires_grad for p in model.parameters()] == flags
    calls = []

    def breaks(module, args, out):
        calls.append(1)
        if len(calls) > 5:                                   # on the line
            raise ValueError("the data end here")

    hook = model.register_forward_hook(breaks)
    with pytest.raises(ValueError, match="the data end here"):
        burnish.tune(model, recipe, targets="all", head=False, calibration=data())
    hook.remove()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters()) and not model.conv._backward_hooks
    model(**data()[0])["loss"].backward()                    # no step is left behind
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items()
               if "running" not in k and "tracked" not in k)


@pytest.mark.parametrize("planted", [0, 1, 2, 3])
def test_a_layer_that_must_change_comes_first(planted):
    """Residual layers, targets made by a copy of which one layer is another."""
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x, labels=None):
            for layer in self.layers:
                x = 0.7 * x + torch.tanh(2 * layer(x))
            return {"loss": None if labels is None else F.mse_loss(x, labels), "logits": x}

    torch.manual_seed(0)
    student = Residual()
    teacher = copy.deepcopy(student)
    nn.init.normal_(teacher.layers[planted].weight, std=0.3)
    batches = []
    for seed in range(4):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        batches.append({"x": x, "labels": teacher(x)["logits"].detach()})
    tuned = burnish.tune(student, "colora(steps=100, lr=0.01, points=2, budget=0.5, even=0.0)",
                         targets="all", head=False, calibration=batches)
    got = settled(tuned)
    first = max(got, key=lambda n: got[n]["contribution"])
    assert first == f"layers.{planted}.weight"
    assert got[first]["rank"] == max(r["rank"] for r in got.values())


def test_a_convolution_is_its_branch_with_stride_and_padding():
    model = net()
    base = copy.deepcopy(model).eval()
    tuned = burnish.tune(model, "colora(budget=0.5, steps=2, points=1, rest=False, scale=0.7, "
                         "depthwise='skip')", targets="all", head=False, calibration=data())
    model.eval()
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.3)
    terms = dict(tuned.terms(Chain))
    conv, fc = terms["conv.weight"], terms["fc.weight"]
    assert conv.A.shape[0] > 1
    batch = data(1)[0]
    letters = [t.detach().clone().requires_grad_() for t in (conv.A, conv.B, fc.A, fc.B)]
    A, B, C, D = letters
    down = F.conv2d(batch["x"], A.view(-1, 3, 3, 3), stride=2, padding=1)   # k x k, then 1 x 1
    h = base.conv(batch["x"]) + 0.7 * F.conv2d(down, B.view(8, -1, 1, 1))
    h = base.norm(base.deep(torch.relu(h))).tanh().mean((2, 3))
    out = base.fc(h) + 0.7 * h @ C.t() @ D.t()
    want = torch.autograd.grad(F.mse_loss(out, batch["labels"]), letters)
    got = model(**batch)
    torch.testing.assert_close(got["logits"], out, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got["loss"], [conv.A, conv.B, fc.A, fc.B]), want,
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tuned.merge()(**batch)["logits"], out, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("depthwise, rest, names", [
    ("whole", True, {"conv.bias", "deep.weight", "deep.bias", "norm.weight", "norm.bias",
                     "fc.bias"}),
    ("whole", False, {"deep.weight"}), ("skip", False, set()),
    ("skip", True, {"conv.bias", "deep.bias", "norm.weight", "norm.bias", "fc.bias"})])
def test_what_else_trains(depthwise, rest, names):
    tuned = burnish.tune(net(), f"colora(budget=0.4, steps=1, points=1, rest={rest}, "
                         f"depthwise='{depthwise}')", targets="all", head=False,
                         calibration=data())
    assert {n for n, _ in tuned.named_parameters() if ".burnish." not in n} == names
    assert {n for n, _ in tuned.terms(Chain)} == set(NAMES)
    groups = tuned.optimizer(weight_decay=0.1).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for n, p in tuned.named_parameters() if n == "deep.weight"}


def test_gains_and_tables_that_are_no_vector_of_biases_stay():
    """Of what is called a bias the vectors train, and no other vector but a norm's."""
    model = net()
    model.gain = nn.Parameter(torch.ones(8, dtype=torch.float64))
    model.position_bias = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    names = {s.name for s in parse("colora")[0].select(Anatomy.of(model))}
    assert {"gain", "position_bias"}.isdisjoint(names) and {"fc.bias", "norm.weight"} <= names


@pytest.mark.parametrize("channels, chains", [(2, set()), (1, {"0.weight"})])
def test_two_groups_of_one_input_are_depthwise_and_one_is_a_convolution(channels, chains):
    model = nn.Sequential(nn.Conv2d(channels, 4, 5, groups=channels))
    place, = match(Anatomy.of(model), "all")
    method = parse("colora(budget=0.7, rest=False)")[0]
    assert {s.name for s in method.select(Anatomy.of(model))} == {"0.weight"} - chains
    assert (method.observe(place) is None) == (not chains)


def test_what_a_rank_costs():
    place, method = Place("a", "weight", "linear", 64, 32), parse("colora")[0]
    assert [method.count(place), method.count(place, 3)] == [96, 3 * 96]
    assert [method.per_token(place), method.per_token(place, 3)] == [1, 3]
    assert method.settings() == {
        "targets": None, "budget": 0.07,                     # the paper's; the others are ours
        "even": 0.5, "scale": 1.0, "depthwise": "whole", "rest": True, "steps": 50, "lr": 1e-4,
        "points": 10, "samples": 32}


def test_depthwise_kernels_that_are_no_target_stay():
    tuned = burnish.tune(net(), "colora(budget=0.4, steps=1, points=1, rest=False)",
                         targets="fc", head=False, calibration=data())
    assert "deep.weight" not in dict(tuned.named_parameters())


@pytest.mark.parametrize("seed", range(30))
def test_ranks_spend_the_budget_and_no_more(seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 12, (), generator=g))
    sides = torch.randint(2, 60, (n, 2), generator=g).tolist()
    weights = (torch.rand(n, generator=g) * 3 * torch.tensor([min(s) for s in sides])).tolist()
    costs, caps = [a + b for a, b in sides], [min(s) for s in sides]
    budget = sum(costs) + int(torch.randint(0, sum(a * b for a, b in sides), (), generator=g))
    found = ranks_to(budget, weights, costs, caps)
    spent = sum(r * c for r, c in zip(found, costs, strict=True))
    assert all(1 <= r <= cap for r, cap in zip(found, caps, strict=True))
    assert spent <= budget
    most = sum(c * cap for c, cap in zip(costs, caps, strict=True))
    assert spent > min(budget, most) - max(costs)
    free = [(r, w) for r, w, cap in zip(found, weights, caps, strict=True) if 1 < r < cap]
    for r, w in free:                                    # one level: each rounded, or one more
        assert all((r - 0.5) / w <= (q + 0.5) / v + 1e-12 for q, v in free)


def test_ranks_follow_the_factor_and_the_width():
    places = match(Anatomy.of(tiny("mlp")[0]))
    assert len(places) == 2 and {p.out for p in places} == {32}
    assert ranks(places, 0.5, [0.5, 1.5]) == [4, 12]
    assert ranks(places, 0.5) == [8, 8]
    assert ranks(places, 0.5, [0.0, 1.0]) == [1, 15]         # none is rounded away
    wide = Place("a", "weight", "linear", 64, 32), Place("b", "weight", "linear", 16, 80)
    assert ranks(wide, 0.5) == [11, 6]                       # of 17 that the budget buys, 32 to 16
    assert ranks(wide, 0.5, [1.0, 2.0]) == [9, 8]


@pytest.mark.parametrize("even", [0.0, 0.4, 1.0])
def test_a_share_moves_ranks_as_far_as_it_may(even):
    place = {n: Place(n, "weight", "linear", 64, 64) for n in "abc"}
    seen = {}
    for n, value in zip("abc", (1.0, 2.0, 6.0), strict=True):
        seen[place[n]] = s = Contribution(64)
        s.leads(torch.full((64, 64), value / 64))
        s.update(torch.ones(64, 64))
    found = parse(f"colora(budget=0.5, even={even})")[0].settle(seen)
    want = [even + (1 - even) * v / 3.0 for v in (1.0, 2.0, 6.0)]
    assert [found[p]["contribution"] for p in place.values()] == pytest.approx([1/9, 2/9, 6/9])
    assert [found[p]["rank"] for p in place.values()] == pytest.approx(
        [w * 0.5 * 3 * 64 * 64 / (128 * 3) for w in want], abs=1)


def test_a_layer_counts_by_the_mean_of_its_filters():
    seen = {}
    for n, out in (("a", 64), ("b", 16)):
        seen[Place(n, "weight", "linear", out, 64)] = s = Contribution(out)
        s.leads(torch.ones(out, 64))
        s.update(torch.ones(out, 64))
    found = parse("colora(budget=0.5)")[0].settle(seen)
    assert [f["contribution"] for f in found.values()] == [0.5, 0.5]


def test_a_contribution_is_a_mean_over_what_was_read_and_nothing_before():
    s = Contribution(2)
    assert s.nbytes == 8 and s.value.tolist() == [0.0, 0.0]
    s.leads(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
    s.update(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert s.value.tolist() == [3.0, 3.0]
    s.pull(torch.tensor([[-3.0, 0.0], [1.0, 1.0]]).bfloat16())
    assert s.value.tolist() == [3.0, 3.0] and s.value.dtype == torch.float32


def test_a_tuning_that_changes_nothing_is_an_error():
    with pytest.raises(RecipeError, match="3 updates at a learning rate of 1e-30 change nothing"):
        burnish.tune(net(), "colora(budget=0.4, steps=3, lr=1e-30)", targets="all", head=False,
                     calibration=data())


def test_the_budget_on_published_shapes_to_one_percent():
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        conv = transformers.ConvNextModel(transformers.ConvNextConfig())
    for model, targets in ((bert, None), (conv, "all")):
        places = [p for p in match(Anatomy.of(model), targets)
                  if p.kind in ("linear", "conv") and not (p.groups > 1 and p.inp == p.kernel)]
        g = torch.Generator().manual_seed(0)
        for even in (0.0, 0.5, 1.0):
            shares = torch.rand(len(places), generator=g).pow(3)
            found = ranks(places, 0.07, (even + (1 - even) * shares / shares.mean()).tolist())
            method = parse("colora")[0]
            spent = sum(method.count(p, r) for p, r in zip(places, found, strict=True))
            assert spent == pytest.approx(0.07 * sum(p.numel for p in places), rel=0.01)


def test_without_data_all_contribute_alike(tmp_path):
    tuned = burnish.tune(net(), "colora(budget=0.4, steps=2, points=1)", targets="all",
                         head=False, calibration=data())
    stir(tuned)
    want = tuned.model.eval()(**data(1)[0])["logits"].detach()
    tuned.save(tmp_path / "a")
    other = net()
    again = burnish.load(other, tmp_path / "a")
    assert settled(again) == settled(tuned)
    torch.testing.assert_close(other.eval()(**data(1)[0])["logits"], want)
    model, batch = tiny("mlp")
    report = burnish.simulate(model, "colora(budget=0.5, rest=False)", batch=batch)
    assert report.trainable == 2 * 8 * 64 + sum(p.numel() for p in model.head.parameters())


@pytest.mark.parametrize("settings, why", [
    ("budget=0.0", "a budget above 0 and below 1 and even from 0 to 1"),
    ("budget=1.0", "a budget above 0"), ("even=-0.1", "even from 0 to 1"),
    ("even=1.1", "even from 0 to 1"), ("steps=0", "steps, points and samples of at least 1"),
    ("points=0", "of at least 1"), ("samples=0", "of at least 1"), ("lr=0.0", "lr > 0")])
def test_settings_are_checked(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"colora({settings})")


def test_the_edges_are_taken():
    for settings in ("even=0.0", "even=1.0", "steps=1, points=1, samples=1"):
        parse(f"colora({settings})")


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match=r"budget=0.07 buys 19 numbers, and a rank of 1 for each "
                       r"of 2 weights takes 51; raise it, or give fewer targets"):
        burnish.tune(net(), "colora(steps=1)", targets="conv,fc", head=False, calibration=data())
    with pytest.raises(ConfigError, match="colora reads data before it starts"):
        burnish.tune(net(), "colora(budget=0.4)", targets="all", head=False)
    with pytest.raises(DataError, match="holds no batch|never reach"):
        burnish.tune(net(), "colora(budget=0.4, steps=1)", targets="all", head=False,
                     calibration=[])


def test_the_defaults():
    m = parse("colora")[0]
    assert (m.budget, m.even, m.scale, m.depthwise, m.rest) == (0.07, 0.5, 1.0, "whole", True)
    assert (m.steps, m.lr, m.points, m.samples) == (50, 1e-4, 10, 32)
