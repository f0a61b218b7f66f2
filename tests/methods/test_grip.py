"""GRIP, IFPL, FPL: the boards against a slow list, the rounds, and a whole run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.boards import boards
from burnish.core.recipe import parse
from burnish.methods.lifecycle.grip import Grip, Round


def slow(p, k):
    """The same by lists that are sorted afresh every time."""
    rows = p.double().tolist()
    found = {c: [] for c in range(p.shape[1])}
    for i, row in enumerate(rows):
        for c in sorted(found, key=lambda c: (-row[c], c)):
            if len(found[c]) < k:
                found[c].append(i)
                break
            worst = min(found[c], key=lambda j: (rows[j][c], -j))
            if row[c] > rows[worst][c]:
                found[c].remove(worst)
                found[c].append(i)
                break
    return sorted((i, c) for c, board in found.items() for i in board)


@pytest.mark.parametrize("n, classes, k", [(40, 5, 3), (40, 5, 8), (12, 4, 3), (30, 3, 1),
                                           (7, 3, 9)])
@pytest.mark.parametrize("coarse", [False, True])
def test_boards(n, classes, k, coarse):
    g = torch.Generator().manual_seed(n + k)
    p = torch.randn(n, classes, generator=g, dtype=torch.float64).mul(2).softmax(1)
    p = (p * 4).round() / 4 if coarse else p             # with many that are equal
    found = boards(p, k)
    assert found == slow(p, k) == boards(p.clone(), k)
    sizes = [sum(c == x for _, x in found) for c in range(classes)]
    assert max(sizes) <= k and len({i for i, _ in found}) == len(found)


def test_boards_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.7, 0.3]])
    # 0 leads class 0; 1 finds it full, and stands for class 1; 2 beats 0, which is out for good;
    # 3 beats 1 in class 1
    assert boards(p, 1) == [(2, 0), (3, 1)]
    assert boards(p, 2) == [(0, 0), (2, 0), (3, 1)]     # 1 had room, and is out for good
    assert boards(p, 0) == []
    for strange in (torch.ones(3), torch.full((2, 2), float("nan"))):
        with pytest.raises(burnish.ConfigError, match="finite probabilities"):
            boards(strange, 1)


def problem():
    torch.manual_seed(0)
    centres = torch.randn(3, 8) * 2
    labels = torch.arange(90) % 3
    x = centres[labels] + 0.7 * torch.randn(90, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[2].weight.copy_(centres + 1.5 * torch.randn(3, 8))
        model[2].bias.zero_()
    return model, x, labels


def loss(out, batch):
    return F.cross_entropy(out, batch[1])


def run(method, seen=lambda r, tuned: None):
    model, x, labels = problem()
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)

    def say():
        assert not model.training and not torch.is_grad_enabled()
        return model(x).softmax(1)

    for r in method.lifecycle(tuned, say, classes=3):
        seen(r, tuned)
        tuned.optimizer(lr=2e-2)
        for _ in range(15):
            tuned.step((x[r.index], r.labels), loss)
        assert model.training
    model.eval()
    return (model(x).argmax(1) == labels).float().mean().item(), tuned


@pytest.mark.parametrize("mode, rounds, ks", [
    ("grip", 10, [3 * i for i in range(1, 11)]), ("grip", 4, [7, 15, 22, 30]),
    ("ifpl", 3, [4, 4, 4]), ("fpl", 10, [4])])
def test_the_rounds(mode, rounds, ks):
    found, rest = [], []
    method = Grip(mode=mode, **{n: v for n, v in (("turns", rounds), ("shots", 4))
                                if (mode, n) not in (("grip", "shots"), ("fpl", "turns"))})
    run(method, lambda r, tuned: (found.append(r), rest.append(
        [p.detach().clone() for p in tuned.parameters()])))
    assert [r.k for r in found] == ks and [r.number for r in found] == list(range(1, len(ks) + 1))
    assert all(r.of == len(ks) for r in found)
    for r in found:
        counts = torch.bincount(r.labels, minlength=3)
        assert int(counts.max()) <= r.k and len(r.index) == len(r.labels)
        assert torch.equal(r.index, r.index.unique())
    if mode == "grip":
        assert found[-1].k * 3 >= 0.9 * 90
    for later in rest[1:]:                               # every round begins where the first did
        assert all(torch.equal(a, b) for a, b in zip(rest[0], later, strict=True))


def test_the_base_labels_first_and_what_was_trained_after():
    model, x, labels = problem()
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    with torch.no_grad():                                # what stands there says nothing of a class
        for p in tuned.parameters():
            p.normal_()
    with torch.no_grad(), tuned.disabled():
        model.eval()
        plain = model(x).softmax(1)
        model.train()
    rounds = Grip(mode="ifpl", turns=2, shots=5).lifecycle(tuned, lambda: model(x).softmax(1),
                                                            classes=3)
    first = next(rounds)
    assert list(zip(first.index.tolist(), first.labels.tolist(), strict=True)) == boards(plain, 5)
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(-2)
        model.eval()
        trained = model(x).softmax(1)
        model.train()
    second = next(rounds)
    assert list(zip(second.index.tolist(), second.labels.tolist(), strict=True)) == \
        boards(trained, 5) != boards(plain, 5)
    assert next(rounds, None) is None


def test_statistics_begin_anew_too():
    """Those of the base, which training moves, and what a part keeps beside its parameters."""
    model, x, labels = problem()
    model = nn.Sequential(*model[:2], nn.BatchNorm1d(8), model[2])
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    tuned.model.get_submodule("0.burnish.default").register_buffer("kept", torch.zeros(2))
    seen = []
    for r in Grip(turns=3).lifecycle(tuned, lambda: model(x).softmax(1), classes=3):
        seen.append({n: b.clone() for n, b in model.named_buffers()})
        tuned.optimizer(lr=2e-2)
        model.train()
        tuned.step((x[r.index], r.labels), loss)
        tuned.model.get_submodule("0.burnish.default").kept.add_(1.0)
        assert not torch.equal(model[2].running_mean, seen[-1]["2.running_mean"])
    assert {"2.running_mean", "2.num_batches_tracked", "0.burnish.default.kept"} <= set(seen[0])
    for later in seen[1:]:
        assert all(torch.equal(b, later[n]) for n, b in seen[0].items())


def test_what_another_adapter_holds_is_left_alone():
    model, x, labels = problem()
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    tuned.add("other", "lora(rank=2)", targets="0", head=False)
    tuned.use("default")
    rounds = Grip(mode="ifpl", turns=2, shots=1).lifecycle(tuned, lambda: model(x).softmax(1),
                                                            classes=3)
    assert next(rounds).k == 1
    others = [p for n, p in model.named_parameters() if ".burnish.other." in f".{n}"]
    own = [p for n, p in model.named_parameters() if ".burnish.default." in f".{n}"]
    before = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in [*own, *others]:
            p.fill_(0.25)
    next(rounds)
    assert others and all(bool((p == 0.25).all()) for p in others)
    assert all(torch.equal(p, b) for p, b in zip(own, before, strict=True))


def test_labels_are_where_the_pool_is():
    """Whatever the default device."""
    model, x, _ = problem()
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    p = model.eval()(x).softmax(1).detach()
    with torch.device("meta"):
        r = next(Grip().lifecycle(tuned, lambda: p, classes=3))
    assert r.index.device == r.labels.device == x.device


def test_a_run_is_repeatable_and_learns_from_what_it_says():
    model, x, labels = problem()
    model.eval()
    before = (model(x).argmax(1) == labels).float().mean().item()
    a, one = run(Grip(turns=5))
    b, two = run(Grip(turns=5))
    assert a == b > before
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_beside_labelled_samples_each_set_counts_alike():
    r = Round(1, 1, 2, torch.tensor([0]), torch.tensor([1]))
    assert r.loss(torch.tensor(2.0)) == 2.0
    assert r.loss(torch.tensor(2.0), torch.tensor(3.0)) == 5.0


def test_its_settings_are_the_paper_s():
    made = parse("grip")[0]
    assert (made.mode, made.turns, made.shots) == ("grip", 10, 16)
    assert [made.size(i, 1000, 10) for i in (1, 2, 10)] == [10, 20, 100]


def test_what_cannot_act_is_refused():
    for settings in ({"turns": 0}, {"shots": 0}):
        with pytest.raises(burnish.ConfigError, match="turns and shots are at least 1"):
            Grip(**settings)
    for mode, name in (("grip", "shots"), ("fpl", "turns")):
        with pytest.raises(burnish.ConfigError, match=f"mode='{mode}' reads no {name}"):
            Grip(mode=mode, **{name: 3})
    assert Grip(mode="grip", turns=1).size(1, 30, 3) == 10               # one is enough
    model, x, _ = problem()
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    with pytest.raises(burnish.ConfigError, match="too few for 3 classes in 40 rounds.*turns=30"):
        next(Grip(turns=40).lifecycle(tuned, lambda: model(x).softmax(1), classes=3))
    with pytest.raises(burnish.ConfigError, match=r"\(samples, 4\) probabilities"):
        next(Grip().lifecycle(tuned, lambda: model(x).softmax(1), classes=4))
    for p in tuned.parameters():
        p.requires_grad_(False)
    with pytest.raises(burnish.ConfigError, match="nothing trains"):
        next(Grip().lifecycle(tuned, lambda: model(x).softmax(1), classes=3))
