"""Diff pruning: gates that are drawn around a pass, the projection, and what trains after it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.weight import panels
from burnish.blocks.weight.concrete import Concrete, Grouped, hard, largest, opened
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.fit import state
from burnish.formats.adapter import load
from burnish.testing import follows, stir
from burnish.testing.models import tiny

OUT, IN = 9, 12
PLACE = Place("l", "weight", "linear", OUT, IN)
STEPS = 8


def z_of(a, u):
    """Written out: the hard concrete gate."""
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + a)))
    return torch.clip(s * 3 - 1.5, 0, 1)


def layer(settings="init=0.4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    tuned = burnish.tune(model, f"diff_pruning({settings})", head=False, targets="0")
    ((_, term),) = tuned.terms(Concrete)
    term.double()
    stir(tuned, size=0.7)
    return tuned, term, model[0].weight.detach().clone(), model[0].bias.detach().clone()


@pytest.mark.parametrize("panel", [panels.PANEL, 4 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("turn", [None, 3], ids=["still", "drawn"])
@pytest.mark.parametrize("kind", ["plain", "structured"])
def test_outputs_and_gradients_are_those_of_the_equation(kind, turn, panel, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    tuned, term, W, bias = layer(f"init=0.4, structured={kind == 'structured'}, seed=5")
    term.turn = turn
    half = torch.full((OUT * IN + 1,), 0.5)
    stream = CounterNoise(5, "diff_pruning/0.weight")
    u = half if turn is None else stream.uniform(OUT * IN + 1, turn=turn)
    u, last = u[:-1].view(IN, OUT).t().double(), u[-1:].double()
    if turn is not None and kind == "structured":
        assert 0 < float(z_of(term.group.detach(), last)) < 1, "else its gradient is nothing"

    def equation(x, w, a, g=None):
        delta = z_of(a.view(OUT, IN), u) * w.view(OUT, IN)
        return x @ (W + (delta if g is None else z_of(g, last) * delta)).t() + bias

    assert 0 < int((z_of(term.gate.view(OUT, IN), u) == 0).sum()) < OUT * IN
    follows(tuned, equation, list(term.theta()), (5, IN))


def test_a_draw_is_another_in_every_turn_and_the_same_in_every_panel():
    term = Concrete(PLACE, 0.3, CounterNoise(1, "x"))
    nn.init.ones_(term.values)
    seen = []
    for turn in (None, 0, 1):
        term.turn = turn
        whole = term.dense().detach()
        parts = torch.cat([term.tile(i, min(i + 5, IN), None) for i in range(0, IN, 5)], 1)
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-7)
        seen.append(whole)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert seen[0].unique().numel() == 1


@pytest.mark.parametrize("a", [-1.5, 0.0, 0.8])
def test_the_expected_number_is_that_of_many_draws(a):
    gates = torch.full((100_000,), a, dtype=torch.float64)
    u = CounterNoise(0, "many").uniform(gates.numel())
    share = (hard(gates, u) > 0).double().mean()
    assert float(opened(gates[:1])) == pytest.approx(1 / (1 + math.exp(-a)))
    assert float(share) == pytest.approx(1 / (1 + math.exp(-a)), abs=5e-3)
    term = Grouped(PLACE, a, CounterNoise(1, "x")).double()
    alone = Concrete(PLACE, a, CounterNoise(1, "x")).double()
    p = 1 / (1 + math.exp(-a))
    assert float(alone.expected().detach()) == pytest.approx(OUT * IN * p)
    assert float(term.expected().detach()) == pytest.approx(OUT * IN * p * p)


@pytest.mark.parametrize("kind", [Concrete, Grouped])
def test_shapes_before_and_after(kind):
    first, then = (kind(PLACE, 0.5, CounterNoise(1, "x"), n) for n in (None, 5))
    assert [tuple(p.shape) for p in first.theta()] == [(OUT * IN,)] * 2 + [(1,)] * (kind is Grouped)
    assert [tuple(p.shape) for p in then.theta()] == [(5,), (0,)] + [(0,)] * (kind is Grouped)
    assert (first.index.numel(), then.index.numel()) == (0, 5)
    assert (first.settled(), then.settled(), then.counted) == ({}, {"entries": 5}, {"entries": 5})
    assert first.counted is None and first.entries() is None and then.entries() is not None
    assert float(then.expected().detach()) == 0 and first.keeps_input and not first.decided
    narrow = kind(PLACE, 0.5, CounterNoise(1, "x"), 2)
    assert narrow.tiled and not narrow.tokenwise and narrow.columns is None, "x is kept whole"


def test_both_ends_of_the_draws_stay_away_and_they_are_even():
    u = CounterNoise(3, "u").uniform(1 << 16)
    assert u.dtype == torch.float32 and 0 < float(u.min()) < 1e-4 and 1 > float(u.max()) > 0.9999
    assert torch.histc(u, 16, 0, 1).sub(4096).abs().max() < 320
    steps = u.double() * 2**23 - 0.5
    assert torch.equal(steps, steps.round()) and (steps.long() & 1).float().mean() > 0.49
    again = CounterNoise(3, "u").uniform(100, 777)
    assert torch.equal(again, u[777:877])


def test_the_penalty_joins_the_gradient_of_the_task():
    grads = []
    for weight in (1e-12, 0.5):
        tuned, term, _, _ = layer(f"init=0.4, structured=True, weight={weight}")
        tuned.optimizer(lr=1e-6)
        x = torch.randn(4, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        at = [term.gate.detach().clone(), term.group.detach().clone()]
        tuned.step((x, x[:, :OUT]), loss=lambda out, b: (out - b[1]).square().mean())
        grads.append([term.gate.grad.clone(), term.group.grad.clone()])
    a, g = (t.requires_grad_() for t in at)
    penalty = 0.5 * (1 / (1 + torch.exp(-a)) * (1 / (1 + torch.exp(-g)))).sum()
    for got, was, want in zip(grads[1], grads[0], torch.autograd.grad(penalty, [a, g]),
                              strict=True):
        torch.testing.assert_close(got - was, want, rtol=1e-6, atol=1e-9)
    (method,) = tuned.recipe
    torch.testing.assert_close(method.penalty(term), 0.5 * opened(term.gate).sum()
                               * opened(term.group).sum())


# -- a run -----------------------------------------------------------------------------------------
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(),
                         nn.Linear(8, 4))


def start(settings="init=0.5, density=0.05", total=STEPS, model=None):
    tuned = burnish.tune(net() if model is None else model, f"diff_pruning({settings})",
                         targets="0,2,4", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=2e-2)
    return tuned


def terms(tuned):
    return [t for _, t in tuned.terms(Concrete)]


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 12, generator=g), torch.randn(16, 4, generator=g)
    return tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())


@pytest.mark.parametrize("structured", [False, True])
def test_exactly_k_stay_the_largest_of_all_and_they_train_on(structured):
    more = f"init=0.5, density=0.05, gate_rate=1.0, structured={structured}"
    tuned = start(more)
    sizes = [12 * 16, 16 * 8, 8 * 4]
    k = round(0.05 * sum(sizes))
    for n in range(4):
        assert not any(t.decided for t in terms(tuned))
        step(tuned, n)
    twin = start(f"{more}, search=0.9")
    for n in range(4):                                     # the same until then
        step(twin, n)
    flat = torch.cat([t.dense().detach().flatten() for t in terms(twin)])
    chosen = flat.abs().topk(k).indices.sort().values
    found = torch.cat([t.index.long() + off for t, off in
                       zip(terms(tuned), (0, sizes[0], sizes[0] + sizes[1]), strict=True)])
    assert torch.equal(found, chosen), "those with the largest |z w|, over all matrices"
    assert torch.equal(torch.cat([t.values.detach() for t in terms(tuned)]), flat[chosen])
    assert all(t.decided and t.index.tolist() == sorted(t.index.tolist()) for t in terms(tuned))
    assert not any(p in tuned.current_optimizer.state for t in terms(tuned) for p in t.theta())
    base = net()
    for n in range(4, STEPS):
        step(tuned, n)
    after = torch.cat([t.values.detach() for t in terms(tuned)])
    assert (after != flat[chosen]).all(), "all of them train"
    changed = 0
    for i, (t, m) in enumerate(zip(terms(tuned), tuned.merge()[::2], strict=True)):
        same = torch.ones(sizes[i], dtype=torch.bool)
        same[t.index.long()] = False
        assert torch.equal(m.weight.flatten()[same], base[2 * i].weight.flatten()[same])
        changed += int((m.weight.flatten() != base[2 * i].weight.flatten()).sum())
    assert changed == k


def test_of_equal_ones_the_first_stay():
    mine = [Concrete(PLACE, 5.0, CounterNoise(1, str(i))) for i in range(2)]
    with torch.no_grad():
        mine[0].values[[7, 3, 90]] = torch.tensor([2.0, -2.0, 1.0])
        mine[1].values[[5, 1, 60]] = torch.tensor([-2.0, 3.0, 2.0])
    for k, want in ((1, [[], [1]]), (2, [[3], [1]]), (3, [[3, 7], [1]]), (4, [[3, 7], [1, 5]]),
                    (5, [[3, 7], [1, 5, 60]]), (6, [[3, 7, 90], [1, 5, 60]])):
        assert [i.tolist() for i, _ in largest(mine, k)] == want, k
    for i, v in largest(mine, 2 * OUT * IN):
        assert i.dtype == torch.int64 and len(v) == len(i)
        assert torch.equal(i, torch.arange(OUT * IN))
    assert [v.tolist() for _, v in largest(mine, 4)] == [[-2.0, 2.0], [3.0, -2.0]]


def test_a_matrix_that_has_none_keeps_nothing():
    tuned = start("init=0.5, density=0.004")               # 1 of 352 entries
    for n in range(5):
        step(tuned, n)
    empty = [t for t in terms(tuned) if not t.values.numel()]
    assert len(empty) == 2 and not any(t.keeps_input for t in empty)
    assert [t.keeps_input for t in terms(tuned) if t.values.numel() == 1] == [True]
    assert sum(p.numel() for p in tuned.parameters()) == 1
    assert not any(t.dense().any() for t in empty)


def test_gates_are_drawn_in_the_passes_of_a_step_alone():
    tuned = start(total=None)
    step(tuned, 0)
    drawn = []

    tuned.model[1].register_forward_hook(lambda *_: drawn.append(terms(tuned)[0].turn))
    x = torch.randn(3, 12)
    tuned.model.train()
    assert torch.equal(tuned.model(x), tuned.model(x)) and drawn == [None, None]
    drawn.clear()
    opt, loss = tuned.current_optimizer, lambda out, b: out.square().mean()
    for _ in range(2):
        opt.zero_grad()
        for _ in range(2):
            tuned.backward((x,), loss)
        opt.step()
    assert drawn == [1, 2, 3, 4], "each pass another draw"
    assert terms(tuned)[0].turn is None
    assert not any(t.decided for t in terms(tuned)), "of a run of unknown length all stay"


@pytest.mark.parametrize(("total", "search", "last"), [
    (8, 0.5, 4), (2, 0.5, 1), (1, 0.5, 1), (3, 0.5, 2), (3, 0.9, 2), (9, 0.01, 1), (8, 0.7, 6)])
def test_when_they_are_chosen(total, search, last):
    tuned = start(f"init=0.5, density=0.05, search={search}", total=total)
    for n in range(total):
        assert any(t.decided for t in terms(tuned)) == (n >= last), n
        step(tuned, n)
    assert all(t.decided for t in terms(tuned))


@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("structured", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(stop, structured, tmp_path):
    """Before, at and after the projection, which is behind the fourth update."""
    settings, ends = f"init=0.5, density=0.05, structured={structured}", []
    for cut in (None, stop):
        tuned = start(settings)
        for n in range(STEPS):
            if n == cut:
                tuned.save(tmp_path / "a", whole=True)
                tree = {"optimizer": state.optimizer_state(tuned.current_optimizer,
                                                           list(tuned.model.named_parameters())),
                        "timeline": tuned.timeline.state()}
                state.save_tree(tree, tmp_path, "run")
                kept = state.load_tree(tmp_path, "run")
                tuned = load(net(), tmp_path / "a")
                tuned.optimizer(lr=2e-2)
                state.load_optimizer_state(tuned.current_optimizer,
                                           tuned.model.named_parameters(), kept["optimizer"])
                tuned.timeline.load(kept["timeline"])
            step(tuned, n)
        ends.append(tuned.tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_a_finished_file_has_index_and_value_of_k_entries(tmp_path):
    from safetensors.torch import load_file

    tuned = start()
    for n in range(STEPS):
        step(tuned, n)
    tuned.save(tmp_path / "a")
    tensors = load_file(next((tmp_path / "a").glob("*.safetensors")))
    k = round(0.05 * 352)
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == k
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".index")) == k
    assert sum(t.numel() for t in tensors.values()) == 2 * k
    again = burnish.load(net(), tmp_path / "a")
    x = torch.randn(5, 12)
    assert torch.equal(again.model(x), tuned.model(x))
    again.total_steps = STEPS
    again.optimizer(lr=1e-2)
    step(again, 0)
    assert sum(t.values.numel() for t in terms(again)) == k, "nothing is chosen again"


def test_measuring_between_two_updates_changes_nothing():
    ends = []
    for measured in (False, True):
        tuned = start()
        for n in range(3):
            step(tuned, n)
        if measured:
            x = torch.randn(6, 12)
            burnish.measure(tuned, (x, x[:, :4]),
                            loss=lambda out, b: (out - b[1]).square().mean())
            assert not any(t.decided for t in terms(tuned))
        for n in range(3, 6):
            step(tuned, n)
        ends.append(tuned.tensors())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


# -- what it says ----------------------------------------------------------------------------------
def test_counts_and_defaults():
    (method,) = burnish.parse("diff_pruning")
    net, _ = tiny("bert", meta=True, hidden_size=768, intermediate_size=3072,
                  num_hidden_layers=12, num_attention_heads=12)
    places = match(Anatomy.of(net), None)
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert sum(method.count(p) for p in places) == 2 * weights
    (grouped,) = burnish.parse("diff_pruning(structured=True)")
    assert sum(grouped.count(p) for p in places) == 2 * weights + 72
    assert method.count(PLACE, entries=7) == 7 and method.per_token(PLACE) == 0
    assert method.settings() == {
        "targets": None, "density": 0.005, "search": 0.5, "weight": 1.25e-7, "init": 5.0,
        "gate_rate": 10.0, "structured": False, "seed": 0}
    ((_, term),) = burnish.tune(nn.Sequential(nn.Linear(3, 2)), "diff_pruning", head=False,
                                targets="0").terms(Concrete)
    assert term.gate.tolist() == [5.0] * 6 and not term.values.any()
    assert (term.gate.burnish_lr, term.gate.burnish_decay) == (10.0, False)


@pytest.mark.parametrize(("settings", "fine"), [
    ("density=0", False), ("density=1", False), ("search=0", False), ("search=1", False),
    ("weight=0", False), ("gate_rate=0", False),
    ("density=0.9, search=0.1, weight=1e-9, gate_rate=0.5", True)])
def test_settings_beyond_their_bounds_are_refused(settings, fine):
    if fine:
        assert burnish.parse(f"diff_pruning({settings})")
        return
    with pytest.raises(RecipeError, match="^diff_pruning: "):
        burnish.parse(f"diff_pruning({settings})")


def test_optimizers_that_cannot_follow_are_refused():
    for other in ("adam8bit", "mezo"):
        with pytest.raises(RecipeError, match=other):
            burnish.parse(f"diff_pruning + {other}")
