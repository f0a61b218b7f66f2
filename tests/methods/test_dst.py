"""Dynamic sparse training: entries that move, shares among matrices, and tasks that do not touch
each other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.dropgrow import Seeking
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.formats.placed import put
from burnish.testing import follows, stir, tiny
from burnish.testing.checks.cost import keeps_what_it_says

GROWTH = ("random", "unfired", "gradient")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def start(settings="every=2", lr=2e-2, total=None):
    tuned = burnish.tune(net(), f"dst({settings})", targets="0,2", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=lr)
    return tuned


def terms(tuned, name=None):
    return [t for _, t in tuned.terms(Seeking, name)]


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 12, generator=g), torch.randn(16, 8, generator=g)
    return tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())


def entries(tuned):
    return [t.index.tolist() for t in terms(tuned)]


@pytest.mark.parametrize("growth", GROWTH)
def test_the_equation_after_moves(growth):
    tuned = burnish.tune(nn.Sequential(nn.Linear(12, 16)).double(),
                         f"dst(every=1, density=0.2, growth={growth!r})", head=False)
    (term,) = terms(tuned)
    tuned.optimizer(lr=0.1)
    term.double()
    x = torch.randn(4, 12, dtype=torch.float64)
    for _ in range(3):
        tuned.step((x, x), loss=lambda out, b: out.square().mean())
    stir(tuned, size=0.5)
    W, b = tuned.model[0].weight.detach().clone(), tuned.model[0].bias.detach().clone()
    index = term.index.long()

    def equation(x, v):
        return x @ (W + torch.zeros(192).double().index_put((index,), v).view(16, 12)).t() + b

    follows(tuned, equation, [term.values], (5, 12))


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("density", [0.1, 0.75])
def test_the_density_is_exact_before_and_after_every_move(growth, density):
    tuned = start(f"every=2, density={density}, growth={growth!r}")
    seen = [entries(tuned)]
    for k in range(6):
        step(tuned, k)
        seen.append(entries(tuned))
        for index, numel in zip(seen[-1], (192, 128), strict=True):
            assert len(set(index)) == len(index) == round(density * numel)
            assert 0 <= min(index) and max(index) < numel
    moved = [a != b for a, b in zip(seen[:-1], seen[1:], strict=True)]
    assert moved == [False, True] * 3
    for a, b, numel in zip(seen[1], seen[2], (192, 128), strict=True):
        n = min(int(0.3 * len(a)), numel - len(a))
        assert b[: len(a) - n] == [p for p in a if p in b] and len(set(b) - set(a)) == n


def test_those_that_never_trained_come_first():
    tuned = start("every=1, density=0.2, prune=0.5, growth='unfired'")
    ever = [set(i) for i in entries(tuned)]
    left = [192 - 38, 128 - 26]
    for n in range(12):
        before = entries(tuned)
        step(tuned, n)
        for k, (a, b) in enumerate(zip(before, entries(tuned), strict=True)):
            come = set(b) - set(a)
            if left[k] >= len(come):
                assert not come & ever[k]
                left[k] -= len(come)
            else:
                left[k] = -1                                 # from then on whoever is free
                assert len(come) == (19, 13)[k]
            ever[k] |= come
    assert left == [-1, -1]


def test_the_largest_gradients_come():
    tuned = start("every=1, growth='gradient'")
    dense = copy.deepcopy(net())
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 12, generator=g), torch.randn(16, 8, generator=g)
    (dense(x) - y).square().mean().backward()
    before = entries(tuned)
    step(tuned, 0)
    for a, b, layer in zip(before, entries(tuned), (dense[0], dense[2]), strict=True):
        size = layer.weight.grad.flatten().abs()
        size[torch.tensor(a)] = -1
        n = int(0.3 * len(a))
        assert b[-n:] == size.argsort(descending=True)[:n].tolist()


def test_moments_go_with_their_entries():
    tuned = start("every=2")
    step(tuned, 0)
    was = [dict(zip(t.index.tolist(), tuned.current_optimizer.state[t.values]["exp_avg"].tolist(),
                    strict=True)) for t in terms(tuned)]
    handler = tuned.timeline.handlers[0][1]
    handler.after_update(1)
    for t, had in zip(terms(tuned), was, strict=True):
        now = tuned.current_optimizer.state[t.values]["exp_avg"].tolist()
        assert now == [had.get(p, 0.0) for p in t.index.tolist()]
        assert now != list(had.values()) and int(tuned.current_optimizer.state[t.values]["step"])


# -- shares ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.6])
def test_erk_by_the_rule_of_fixing_what_is_full(density):
    places = [Place("a", "weight", "linear", 300, 20), Place("b", "weight", "linear", 10, 8),
              Place("c", "weight", "conv", 64, 32 * 9, kernel=9)]
    sizes = [300 * 20, 80, 64 * 288]
    sides = [320, 18, 64 + 32 + 6]
    full: set[int] = set()
    while True:
        eps = (density * sum(sizes) - sum(sizes[i] for i in full)) / \
            sum(s for i, s in enumerate(sides) if i not in full)
        over = {i for i in range(3) if i not in full and eps * sides[i] > sizes[i]}
        if not over:
            break
        full |= over
    want = [sizes[i] if i in full else eps * sides[i] for i in range(3)]
    got = parse(f"dst(density={density}, layout='erk')")[0].shares(places)
    assert sum(got) == round(density * sum(sizes)), "the budget to the entry"
    assert all(abs(a - b) <= 1 for a, b in zip(got, want, strict=True))


def test_erk_on_a_model_trains_what_it_says():
    tuned = start("density=0.1, layout='erk'")
    assert [t.values.numel() for t in terms(tuned)] == [17, 15]          # 32 of 320, as 28 to 24
    settled = tuned.adapters["default"].settled["dst"]
    assert [settled[n]["entries"] for n in ("0.weight", "2.weight")] == [17, 15]


def test_counts_on_llama_7b():
    llama = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    (method,) = parse("dst(density=0.1)")
    places = match(Anatomy.of(tiny("llama", meta=True, **llama)[0]), "q,v")
    assert sum(method.count(p) for p in places) == 64 * 1_677_722
    assert sum(method.shares(places)) == 64 * 1_677_722
    assert method.count(places[0], entries=5) == 5
    assert parse("dst(density=0.001)")[0].count(Place("l", "w", "linear", 4, 4)) == 1


# -- tasks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", GROWTH)
def test_a_second_task_leaves_the_first_to_the_bit(growth):
    tuned = start(f"every=1, density=0.2, growth={growth!r}")
    for k in range(3):
        step(tuned, k)
    x = torch.randn(5, 12)
    want, one = tuned.model(x).detach(), [set(i) for i in entries(tuned)]
    tuned.add("two", f"dst(every=1, density=0.2, prune=0.9, growth={growth!r}, seed=7)",
              targets="0,2", head=False)
    tuned.use({"default": 1.0, "two": 1.0}, train="two")
    tuned.optimizer(lr=2e-2)
    for k in range(8):
        step(tuned, k)
        for had, term in zip(one, terms(tuned, "two"), strict=True):
            assert not had & set(term.index.tolist()), "nobody comes where another task is"
    assert not torch.equal(tuned.model(x), want)
    tuned.use("default")
    assert torch.equal(tuned.model(x), want)


def test_a_task_too_many_is_refused():
    tuned = start("density=0.6")
    with pytest.raises(RecipeError, match=r"115 entries of 0.weight .* 77 are left; .*0.4 fits"):
        tuned.add("two", "dst(density=0.6)", targets="0,2", head=False)


def test_one_entry_will_do():
    tuned = burnish.tune(nn.Sequential(nn.Linear(4, 4)), "dst(density=0.05)", head=False)
    assert [t.values.numel() for t in terms(tuned)] == [1]


def test_where_all_entries_train_nobody_moves():
    tuned = burnish.tune(nn.Sequential(nn.Linear(4, 4)), "dst(density=0.99, every=1)", head=False)
    x = torch.randn(3, 4)
    tuned.step((x, x), loss=lambda out, b: (out - b[1]).square().mean())
    assert entries(tuned) == [list(range(16))]


def test_all_that_is_free_is_taken_where_more_would_move():
    tuned = start("density=0.75, prune=1, every=1")
    before = [set(t.index.tolist()) for t in terms(tuned)]
    step(tuned, 0)
    moved = [len(set(t.index.tolist()) - b) for t, b in zip(terms(tuned), before, strict=True)]
    assert moved == [192 - 144, 128 - 96]


def test_with_little_room_fewer_move():
    tuned = start("density=0.5, every=1")
    tuned.add("two", "dst(density=0.45, prune=1, every=1)", targets="0,2", head=False)
    tuned.use({"default": 1.0, "two": 1.0}, train="two")
    tuned.optimizer(lr=1e-2)
    before = [set(t.index.tolist()) for t in terms(tuned, "two")]
    step(tuned, 0)
    after = [set(t.index.tolist()) for t in terms(tuned, "two")]
    moved = [len(b - a) for a, b in zip(before, after, strict=True)]
    assert moved == [192 - 96 - 86, 128 - 64 - 58]


# -- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_in_the_same_bits(growth, stop):
    settings = f"every=2, density=0.3, growth={growth!r}"
    ends = []
    for cut in (None, stop):
        tuned = start(settings, total=8)
        for k in range(8):
            if k == cut:
                saved = copy.deepcopy((tuned.timeline.state(), tuned.tensors(),
                                       tuned.current_optimizer.state_dict()))
                tuned = start(settings)
                put(tuned, saved[1], "memory")
                tuned.current_optimizer.load_state_dict(saved[2])
                tuned.timeline.load(saved[0])
            step(tuned, k)
        ends.append(tuned.tensors())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


@pytest.mark.parametrize("growth", GROWTH)
def test_a_saved_adapter_answers_the_same(growth, tmp_path):
    tuned = start(f"every=1, layout='erk', growth={growth!r}")
    for k in range(3):
        step(tuned, k)
    tuned.save(tmp_path / "a")
    again = burnish.load(net(), tmp_path / "a")
    x = torch.randn(3, 12)
    assert torch.equal(again.model(x), tuned.model(x)) and entries(again) == entries(tuned)


# -- what it says ----------------------------------------------------------------------------------
def test_draws_follow_the_seed():
    assert entries(start("seed=1")) != entries(start("seed=2"))
    a, b = start("every=1, seed=1"), start("every=1, seed=1")
    for t in (a, b):
        step(t, 0)
    assert entries(a) == entries(b)


def test_the_defaults():
    assert parse("dst")[0].settings() == {
        "targets": None, "density": 0.1, "layout": "uniform", "growth": "random", "every": 100,
        "prune": 0.3, "seed": 0}
    assert parse("dst")[0].repeats() == 1 and parse("dst(layout='erk')")[0].repeats() is None


def test_kept_for_backward_is_the_input_alone():
    assert keeps_what_it_says("dst", "llama") is None


@pytest.mark.parametrize("settings", ["density=0", "density=1", "prune=0", "prune=1.1", "every=0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(RecipeError, match="^dst: density is"):
        parse(f"dst({settings})")


@pytest.mark.parametrize("settings", ["density=0.01", "density=0.99", "prune=1", "every=1"])
def test_settings_at_their_bounds_are_taken(settings):
    assert parse(f"dst({settings})")
