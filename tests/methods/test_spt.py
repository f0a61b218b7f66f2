"""SPT: LoRA where many entries are sensitive, elsewhere these entries alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.errors import RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.delta.sparse.spt import nearest
from burnish.testing import follows, stir, tiny
from burnish.testing.checks.cost import keeps_what_it_says


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 14), nn.Linear(14, 3)
        nn.init.normal_(self.c.weight)

    def forward(self, x, labels=None):
        out = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return {"logits": out, "loss": F.cross_entropy(out, labels)}


def batches(n=3, size=6):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 12, generator=g, dtype=torch.float64),
             "labels": torch.randint(0, 3, (size,), generator=g)} for _ in range(n)]


def made(settings, **kw):
    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"spt({settings})", head=False, targets="a,b,c",
                         calibration=batches(), **kw)
    return tuned, base


def plan(base, data, budget, rank, ease):
    """Every number of most sensitive entries, one after the other; the plan nearest to budget."""
    names = ["a.weight", "b.weight", "c.weight"]
    Ws = [base.get_parameter(n) for n in names]
    total = [sum(torch.autograd.grad(base(**b)["loss"], W)[0] ** 2 for b in data) for W in Ws]
    ranked = sorted(((float(v), k, i) for k, t in enumerate(total)
                     for i, v in enumerate(t.flatten())), reverse=True)
    best = None
    chosen = [set(), set(), set()]
    for _, k, i in ranked:
        chosen[k].add(i)
        P = [rank * sum(W.shape) for W in Ws]
        lora = [len(c) >= p / ease for c, p in zip(chosen, P, strict=True)]
        cost = sum(p if yes else len(c) for yes, p, c in zip(lora, P, chosen, strict=True))
        if best is None or abs(cost - budget) < best[0]:
            best = abs(cost - budget), {n: "lora" if yes else set(c) for n, yes, c in
                                        zip(names, lora, chosen, strict=True)}
    return best[1]


@pytest.mark.parametrize("budget, rank, ease", [(20, 2, 10.0), (70, 2, 10.0), (90, 2, 3.0),
                                                (130, 2, 10.0), (60, 1, 1.0), (10**6, 2, 4.0)])
def test_the_plan_is_the_one_nearest_to_the_budget(budget, rank, ease):
    tuned, base = made(f"budget={budget}, rank={rank}, ease={ease}")
    want = plan(base, batches(), budget, rank, ease)
    got = {n: "lora" for n, _ in tuned.terms(Chain)}
    got |= {n: set(t.index.tolist()) for n, t in tuned.terms(SparseDelta)}
    assert got == {n: v for n, v in want.items() if v}
    cost = sum(p.numel() for p in tuned.parameters())
    shapes = {"a.weight": 28, "b.weight": 30, "c.weight": 17}
    assert cost == sum(rank * shapes[n] if v == "lora" else len(v) for n, v in want.items())


def test_both_kinds_stand_in_one_plan_and_only_so_many_samples_are_read():
    tuned, base = made("budget=80, rank=2, samples=4")
    kinds = [len(list(tuned.terms(k))) for k in (Chain, SparseDelta)]
    assert kinds[0] and kinds[1]
    first = [{k: v[:4] for k, v in batches()[0].items()}]
    want = plan(base, first, 80, 2, 10.0)
    assert {n: set(t.index.tolist()) for n, t in tuned.terms(SparseDelta)} == \
        {n: v for n, v in want.items() if v and v != "lora"}


def test_outputs_and_gradients_are_those_of_the_equation():
    tuned, base = made("budget=80, rank=2, scale=0.7")
    stir(tuned, size=0.5)
    terms = {n: t.double() for n, t in [*tuned.terms(Chain), *tuned.terms(SparseDelta)]}
    letters = [p for t in terms.values() for p in t.parameters()]

    class Just:
        model = staticmethod(lambda x: tuned.model(x, torch.zeros(len(x)).long())["logits"])
        parameters = staticmethod(tuned.parameters)

    def equation(x, *values):
        left, W = list(values), {}
        for n, t in terms.items():
            w = base.get_parameter(n).detach()
            if isinstance(t, Chain):
                A, B = left.pop(0), left.pop(0)
                W[n] = w + 0.7 * B @ A
            else:
                at = t.index.long()
                W[n] = w.index_put((at // w.shape[1], at % w.shape[1]), left.pop(0),
                                   accumulate=True)
        for k in "abc":
            layer = base.get_submodule(k)
            x = F.linear(x, W.get(f"{k}.weight", layer.weight), layer.bias)
            x = torch.tanh(x) if k != "c" else x
        return x

    follows(Just, equation, letters, (7, 12), merged=False)


def test_what_is_not_chosen_stays_to_the_bit_where_there_is_no_lora():
    tuned, base = made("budget=80, rank=2")
    sparse = {n: set(t.index.tolist()) for n, t in tuned.terms(SparseDelta)}
    loras = {n for n, _ in tuned.terms(Chain)}
    tuned.optimizer(lr=1e-2, weight_decay=0.1)
    for b in batches():
        tuned.step(b)
    tuned.merge()
    assert sparse and loras
    for n, p in base.named_parameters():
        moved = set((tuned.model.get_parameter(n) != p).flatten().nonzero().squeeze(1).tolist())
        assert len(moved) == p.numel() if n in loras else moved == sparse.get(n, set()), n


def test_it_starts_as_the_base():
    tuned, base = made("budget=80, rank=2")
    b = batches()[0]
    assert torch.equal(tuned.model(**b)["logits"], base(**b)["logits"])


def test_the_plan_of_a_real_shape_is_within_two_per_cent_of_the_budget():
    """ViT-B/16: 72 matrices, one LoRA of rank 8 on 768 x 768 is 12,288."""
    (method,) = parse("spt")
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    places = [Place(f"{i}.{j}", "weight", "linear", o, n) for i in range(12)
              for j, (o, n) in enumerate(shapes)]
    assert method.count(places[0]) == 12_288
    costs = [method.steps(p) for p in places]
    assert [sum(c) for c in costs[:6]] == [12_288] * 4 + [8 * 3840] * 2
    g = torch.Generator().manual_seed(0)
    scores = [(torch.rand(len(c), generator=g) * (k % 7 + 1)).sort(descending=True).values
              for k, c in enumerate(costs)]
    for budget in (50_000, 100_000, 200_000, 400_000, 600_000, 800_000, 1_000_000):
        chosen = nearest(scores, costs, budget)
        total = sum(sum(c[:n]) for c, n in zip(costs, chosen, strict=True))
        assert total == pytest.approx(budget, rel=0.02)


def test_a_folder_needs_no_data(tmp_path):
    tuned, base = made("budget=80, rank=2")
    stir(tuned)
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")
    b = batches()[0]
    assert torch.equal(again.model(**b)["logits"], tuned.model(**b)["logits"])
    assert again.adapters["default"].settled == tuned.adapters["default"].settled


def test_the_promise_of_a_plan_of_loras_is_kept():
    net, batch = tiny("vit")
    recipe = "spt(budget=1_000_000, rank=2)"
    promised = burnish.simulate(copy.deepcopy(net), recipe, batch).peak_bytes
    tuned = burnish.tune(net, recipe, calibration=[batch])
    tuned.optimizer(lr=1e-3)
    assert burnish.measure(tuned, batch).peak_bytes == pytest.approx(promised, rel=0.03)


def test_of_equal_scores_the_earlier_count():
    even = [torch.ones(40), torch.ones(40)]
    assert nearest(even, [[1] * 40, [1] * 40], 50) == [40, 10]
    assert nearest([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [[1, 9], [1]], 2) == [1, 1]


def test_refusals_defaults_and_cost():
    for text in ("budget=0", "ease=0.9", "samples=0"):
        with pytest.raises(RecipeError, match="budget, ease and samples are at least 1"):
            parse(f"spt({text})")
    parse("spt(budget=1, ease=1.0, samples=1)")
    (method,) = parse("spt")
    assert method.by_data, "a promise made without data is of the most"
    assert method.settings() == {"targets": None, "budget": 400_000, "rank": 8, "ease": 10.0,
                                 "scale": 1.0, "samples": 256}
    with pytest.raises(RankError, match="largest rank there is 3"):
        made("rank=4")
    place = Place("a", "weight", "linear", 9, 7)
    assert (method.per_token(place), method.per_token(place, entries=3)) == (8, 0)
    assert (method.count(place), method.count(place, entries=3), method.count(place, rank=8)) == \
        (128, 3, 128)
    assert keeps_what_it_says("spt", "vit") is None
