"""FISH mask: the entries with the largest Fisher information over all matrices."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.largest import Largest, keep_largest
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows, tiny
from burnish.testing.checks.cost import keeps_what_it_says


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)
        nn.init.normal_(self.b.weight, std=0.3)

    def forward(self, x, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"logits": out, "loss": F.cross_entropy(out, labels)}


def batches(n=3, size=5):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 12, generator=g, dtype=torch.float64),
             "labels": torch.randint(0, 3, (size,), generator=g)} for _ in range(n)]


def made(settings="density=0.1", data=None, targets="a,b"):
    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"fish({settings})", head=False, targets=targets,
                         calibration=data or batches())
    return tuned, dict(tuned.terms(SparseDelta)), base


def fisher(base, data, samples=10**9):
    """Sample by sample, the dense way: mean of squared gradients of -log p(y|x)."""
    total = {"a.weight": 0.0, "b.weight": 0.0}
    n = 0
    for batch in data:
        for x, y in zip(batch["x"], batch["labels"], strict=True):
            if n == samples:
                break
            n += 1
            out = base.b(torch.tanh(base.a(x)))
            lost = -out.log_softmax(-1)[y]
            for name, g in zip(total, torch.autograd.grad(lost, [base.a.weight, base.b.weight]),
                               strict=True):
                total[name] = total[name] + g**2
    return {name: t / n for name, t in total.items()}


def top(F_n, k):
    """{name: flat positions} of the k largest over all."""
    ranked = sorted(((float(v), name, i) for name, t in F_n.items()
                     for i, v in enumerate(t.flatten())), reverse=True)[:k]
    return {name: {i for _, m, i in ranked if m == name} for name in F_n}


def test_the_largest_of_the_dense_per_sample_reference_train():
    tuned, terms, base = made("density=0.1")
    want = top(fisher(base, batches()), 24)                  # 0.1 (12 16 + 16 3)
    assert {n: set(t.index.tolist()) for n, t in terms.items()} == want
    assert sum(p.numel() for p in tuned.parameters()) == 24 and all(want.values())
    mean = {n: g**2 for n, g in zip(want, torch.autograd.grad(
        sum(base(**b)["loss"] for b in batches()), [base.a.weight, base.b.weight]), strict=True)}
    assert top(mean, 24) != want, "the square of a mean is another score"


@pytest.mark.parametrize("density", [0.001, 0.004, 0.02, 0.5, 1.0])
def test_the_budget_is_met_to_the_entry_and_a_matrix_may_have_none(density):
    tuned, terms, base = made(f"density={density}")
    k = max(1, round(density * 240))
    want = {n: v for n, v in top(fisher(base, batches()), k).items() if v}
    assert {n: set(t.index.tolist()) for n, t in terms.items()} == want
    assert sum(p.numel() for p in tuned.parameters()) == k
    assert len(want) == 1 or density > 0.01


def test_only_so_many_samples_are_read():
    _, terms, base = made("density=0.1, samples=3")
    assert {n: set(t.index.tolist()) for n, t in terms.items()} == \
        top(fisher(base, batches(), samples=3), 24)


def test_rounds_choose_what_one_round_chooses(monkeypatch):
    """A matrix at a time: only candidates of the others stand beside it."""
    from burnish.engine.observe import Pass

    _, want, _ = made("density=0.1")
    split, seen = Pass._split, []

    def one_by_one(self, together):
        assert not together
        whole = split(self, together)
        for place in [p for part in whole for p in part]:
            yield [place]
            seen.append({p.path: (s.total.numel(), len(s.scores)) for p, s in
                         zip(whole[0], self_stats(self), strict=False)})

    def self_stats(self):
        return [kept[p] for p in kept]

    kept = {}
    observe = type(parse("fish")[0]).observe

    def remember(self, place):
        kept[place] = observe(self, place)
        return kept[place]

    monkeypatch.setattr(type(parse("fish")[0]), "observe", remember)
    monkeypatch.setattr(Pass, "_split", one_by_one)
    _, got, _ = made("density=0.1")
    assert {n: t.index.tolist() for n, t in got.items()} == \
        {n: t.index.tolist() for n, t in want.items()}
    assert all(s.total.numel() == 1 and len(s.scores) <= 24 for s in kept.values())


def test_of_labels_drawn_from_the_model_the_mean_is_the_true_fisher():
    """E over y ~ p(y|x), class by class, against many draws."""
    data = [{k: v[:1].repeat(400, *[1] * (v.dim() - 1)) for k, v in batches()[0].items()}]
    tuned, terms, base = made("density=1.0, sampled=True, samples=400", data, targets="b")
    x = data[0]["x"][0]
    out = base.b(torch.tanh(base.a(x)))
    want = sum(out.softmax(-1)[y].detach() * torch.autograd.grad(
        -out.log_softmax(-1)[y], base.b.weight, retain_graph=True)[0] ** 2 for y in range(3))
    (method,) = tuned.recipe
    stat = Largest(3, 16)
    torch.manual_seed(0)
    for _ in range(400):
        lost = method.read_loss(base, None, lambda b: {"logits": out[None]})
        stat.update(torch.autograd.grad(lost, base.b.weight, retain_graph=True)[0])
    torch.testing.assert_close(stat.value, want, rtol=0.15, atol=0.02 * float(want.max()))
    label = {k: v[:1] for k, v in data[0].items()}
    other = made("density=0.1, sampled=True, samples=400", data)[1]
    assert {n: set(t.index.tolist()) for n, t in other.items()} != \
        top(fisher(base, [label]), 24), "the label has no say"


def test_labels_are_drawn_for_every_token_and_only_from_logits():
    (method,) = parse("fish(sampled=True)")
    logits = torch.randn(2, 5, 7).double()
    lost = method.read_loss(nn.Identity(), None, lambda b: logits)
    assert lost.dim() == 0 and float(lost) > 0
    sure = torch.full((1, 4, 3), -50.0)
    sure[..., 1] = 50
    assert float(method.read_loss(nn.Identity(), None, lambda b: sure)) < 1e-6
    even = torch.zeros(1, 4, 3, requires_grad=True)          # log p of all tokens: their sum
    lost = method.read_loss(nn.Identity(), None, lambda b: even)
    assert float(lost.detach()) == pytest.approx(4 * float(torch.tensor(3.0).log()), rel=1e-6)
    out = SimpleNamespace(logits=logits.bfloat16())
    half = method.read_loss(nn.Identity(), None, lambda b: out)
    assert half.dtype == torch.float32 and float(half) > 0
    for out in ({"loss": torch.ones(())}, torch.ones(3), None):
        with pytest.raises(RecipeError, match="draws labels from logits"):
            method.read_loss(nn.Identity(), None, lambda b, out=out: out)


def test_outputs_and_gradients_are_those_of_the_equation():
    tuned, terms, base = made("density=0.1")
    for t in terms.values():
        t.double()
        nn.init.normal_(t.values)
    index = [(t.index.long() // w, t.index.long() % w)
             for t, w in zip(terms.values(), (12, 16), strict=True)]

    class Just:
        model = staticmethod(lambda x: tuned.model(x, torch.zeros(len(x)).long())["logits"])
        parameters = staticmethod(tuned.parameters)

    def equation(x, va, vb):
        A = base.a.weight.detach().index_put(index[0], va, accumulate=True)
        B = base.b.weight.detach().index_put(index[1], vb, accumulate=True)
        return F.linear(torch.tanh(F.linear(x, A, base.a.bias)), B, base.b.bias)

    follows(Just, equation, [t.values for t in terms.values()], (7, 12), merged=False)


def test_what_is_not_chosen_stays_to_the_bit_under_decay_and_momentum():
    tuned, terms, base = made("density=0.1")
    opt = tuned.optimizer(lr=1e-2, weight_decay=0.1)
    for b in batches():
        tuned.step(b)
    assert sum(t.numel() for s in opt.state.values() for t in s.values() if t.dim()) == 2 * 24
    tuned.merge()
    for n, p in base.named_parameters():
        moved = (tuned.model.get_parameter(n) != p).flatten().nonzero().squeeze(1).tolist()
        assert set(moved) == (set(terms[n].index.tolist()) if n in terms else set())


def test_a_folder_needs_no_data_and_claims_no_more_than_there_is(tmp_path):
    import json

    tuned, terms, base = made("density=0.02")
    for t in terms.values():
        nn.init.normal_(t.values)
    tuned.save(tmp_path / "a")
    again = dict(burnish.load(copy.deepcopy(base), tmp_path / "a").terms(SparseDelta))
    assert {n: (t.index.tolist(), t.values.tolist()) for n, t in again.items()} == \
        {n: (t.index.tolist(), t.values.tolist()) for n, t in terms.items()}
    config = tmp_path / "a" / "adapter_config.json"
    said = json.loads(config.read_text())
    said["adapters"]["default"]["settled"]["fish"]["b.weight"]["entries"] = 10**12
    config.write_text(json.dumps(said))
    with pytest.raises(burnish.BurnishError):
        burnish.load(base, tmp_path / "a")


def test_equal_scores_are_the_earlier_ones():
    a, b = Largest(2, 3), Largest(1, 4)
    a.update(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]]))
    b.update(torch.tensor([[2.0, 1.0, 1.0, 2.0]]))
    assert keep_largest([a, b], 5) == [3, 2]
    assert (a.index.tolist(), b.index.tolist()) == ([5, 1, 0], [0, 3])
    assert a.scores.tolist() == [9.0, 4.0, 1.0]
    assert keep_largest([a, b], 2) == [2, 0] and a.index.tolist() == [5, 1]
    assert keep_largest([Largest(2, 2)], 3) == [0], "nothing was read there yet"


def test_refusals_defaults_and_cost():
    for text in ("density=0.0", "density=1.1", "samples=0"):
        with pytest.raises(RecipeError, match=r"density is in \(0, 1\] and samples at least 1"):
            parse(f"fish({text})")
    parse("fish(density=1.0, samples=1)")
    (method,) = parse("fish")
    assert method.settings() == {"targets": None, "density": 0.005, "sampled": False,
                                 "samples": 1024}
    place = Place("a", "weight", "linear", 100, 70)
    assert method.count(place) == 35 and method.count(place, 7) == 7
    assert method.count(Place("a", "weight", "linear", 2, 3)) == 1
    assert method.per_token(place) == 0 and keeps_what_it_says("fish", "vit") is None
    assert tiny("vit")
