"""LLM-QFA: the equation in float64 with grids written out, which factors train, what means are
visited, the search and what it leaves."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.choose.genes import genetic
from burnish.blocks.choose.widths import drawn, swept, tilted, within
from burnish.core.errors import BurnishError, ConfigError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place, Site
from burnish.formats.adapter import load
from burnish.testing import stir
from burnish.testing.equation import follows
from burnish.testing.models import tiny

F64 = torch.float64
SMALL = "llm_qfa(rank=2, group=8, alpha=3.0)"


def rounded(W, bits, group):
    """Each run of an output on the grid with the least squared error, number by number."""
    out, top = torch.empty_like(W, dtype=F64), 2**bits - 1
    for o, row in enumerate(W.double().tolist()):
        size = group or len(row)
        for i in range(0, len(row), size):
            w, tried = row[i : i + size], []
            for k in range(21):
                keep = 1 - k / 40
                low, high = min(0.0, min(w)) * keep, max(0.0, max(w)) * keep
                s = (high - low) / top or 1.0
                z = round(-low / s)
                tried.append([s * (max(0, min(top, round(v / s) + z)) - z) for v in w])
            out[o, i : i + size] = torch.tensor(
                min(tried, key=lambda v: sum((a - b) ** 2 for a, b in zip(v, w, strict=True))))
    return out


def one(recipe=SMALL, kind="linear"):
    torch.manual_seed(0)
    layer = nn.Linear(20, 9) if kind == "linear" else Conv1D(9, 20)
    nn.init.normal_(layer.weight, mean=0.3)
    W = layer.weight.detach().clone() if kind == "linear" else layer.weight.detach().t().clone()
    bias = layer.bias.detach().double().clone()
    tuned = burnish.tune(nn.Sequential(layer), recipe, targets="0", head=False)
    return tuned, tuned.recipe.named("llm_qfa"), W, bias


def deep(layers=28, width=8, **settings):
    """A stack of equal linears."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    text = ", ".join(f"{k}={v!r}" for k, v in {"rank": 1, "group": 8, **settings}.items())
    tuned = burnish.tune(net, f"llm_qfa({text})", targets=[str(i) for i in range(layers)],
                         head=False)
    return tuned, tuned.recipe.named("llm_qfa")


def square(out, batch):
    return (out - batch[1]).square().mean()


@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_equation_written_out(kind, bits):
    tuned, part, W, bias = one(kind=kind)
    stir(tuned, size=0.3)
    held, term = part.layers(tuned)["0.weight"]
    part.choose(tuned, {"0.weight": bits})
    Q = rounded(W, bits, 8)
    got = held.weight() if kind == "linear" else held.weight().t()
    torch.testing.assert_close(got.double(), Q, rtol=1e-5, atol=1e-6)
    tuned.model.double()
    A, B = (tuned.model.get_parameter(f"0.burnish.default.llm_qfa.{n}{bits}") for n in "AB")
    V = part.layers(tuned)["0.weight"][0].weight().double()
    V = V if kind == "linear" else V.t()
    for p in tuned.model.parameters():
        p.requires_grad_(p is A or p is B)
    follows(tuned, lambda x, A, B: x @ (V + 1.5 * B @ A).t() + bias, [A, B], (3, 20))


def test_defaults():
    m = parse("llm_qfa")[0]
    assert (m.bits, m.rank, m.alpha, m.group, m.widths) == ("2-3-4", 64, 64.0, 128, (2, 3, 4))


def test_the_count_of_a_published_shape():
    """Three pairs of rank 64 on every linear of LLaMA-7B: 479.7 M, as printed."""
    part = parse("llm_qfa")[0]
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]

    class Shape:
        def __init__(self, i, o):
            self.inp, self.out = i, o

    assert 32 * sum(part.count(Shape(*s)) for s in shapes) == 479_723_520


def test_start_is_the_model_in_its_largest_width():
    tuned, part, W, bias = one()
    x = torch.randn(4, 20, dtype=F64)
    torch.testing.assert_close(tuned.model(x.float()).double(), x @ rounded(W, 4, 8).t() + bias,
                               rtol=1e-4, atol=1e-4)


def test_only_the_drawn_factors_have_gradients_and_move():
    tuned, part = deep(6)
    x, y = torch.randn(2, 16, 8)
    tuned.optimizer(lr=1e-2, weight_decay=0.1)
    stir(tuned)
    times = {}
    for step in range(12):
        before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
        loss = tuned.backward((x, y), square)
        chosen = {n: q.chosen for n, (q, _) in part.layers(tuned).items()}
        assert tuple(chosen.values()) == part.drawn(step, [64] * 6)
        mine = {f"{i}.burnish.default.llm_qfa.{k}{chosen[f'{i}.weight']}"
                for i in range(6) for k in "AB"}
        assert {n for n, p in tuned.model.named_parameters() if p.grad is not None} == mine
        assert loss.isfinite()
        tuned.current_optimizer.step()
        now = dict(tuned.model.named_parameters())
        assert {n for n in now if not torch.equal(now[n], before[n])} == mine
        for n in mine:
            times[n] = times.get(n, 0) + 1
        tuned.current_optimizer.zero_grad(set_to_none=True)
    state = tuned.current_optimizer.state
    counts = {n: int(state[p]["step"]) for n, p in tuned.model.named_parameters() if p in state}
    assert counts == times and len(set(times.values())) > 1      # a count for each of them


def test_widths_do_not_interfere():
    """What one width learns leaves the answers of the others as they were, to the bit."""
    tuned, part = deep(3)
    x, y = torch.randn(2, 16, 8)
    names = list(part.layers(tuned))

    def answers(bits):
        part.choose(tuned, dict.fromkeys(names, bits))
        with torch.no_grad():
            return tuned.model(x)

    before = {b: answers(b) for b in (2, 3, 4)}
    part.choose(tuned, dict.fromkeys(names, 3))
    theta = [p for _, t in part.layers(tuned).values() for p in t.factors_of(3)]
    plain = torch.optim.SGD(theta, lr=1.0)
    square(tuned.model(x), (x, y)).backward()
    plain.step()
    for b in (2, 3, 4):
        assert torch.equal(answers(b), before[b]) == (b != 3)


def test_a_choice_between_forward_and_backward_is_found():
    tuned, part = deep(2)
    out = tuned.model(torch.randn(4, 8)).sum()
    part.choose(tuned, {"1.weight": 2})
    with pytest.raises(RuntimeError):
        out.backward()


def histogram(part, layers, steps=4000, bins=10):
    counts = [0] * bins
    for step in range(steps):
        mean = sum(part.drawn(step, [64] * layers)) / layers
        counts[min(bins - 1, int((mean - 2) / 2 * bins))] += 1
    return counts, sum((c - steps / bins) ** 2 / (steps / bins) for c in counts)


def test_the_mean_bits_are_flat_where_uniform_draws_are_peaked():
    """99 % of chi^2 with nine degrees of freedom: 21.7."""
    counts, flat = histogram(parse("llm_qfa")[0], 224)
    assert flat < 21.7, counts
    counts, peaked = histogram(parse("llm_qfa(draw='uniform')")[0], 224)
    assert peaked > 1000 and max(counts) > 0.4 * 4000 and counts[0] == counts[-1] == 0


def test_a_draw_is_near_its_mean_and_known_by_seed_and_step():
    for mean in (2.0, 2.3, 3.0, 3.9, 4.0):
        genes = drawn((2, 3, 4), [1] * 60, mean, Random(1))
        assert abs(sum(genes) / 60 - mean) <= 0.05 + 1e-9 and set(genes) <= {2, 3, 4}
        p = tilted((2, 3, 4), mean)
        assert sum(p) == pytest.approx(1)
        assert sum(b * v for b, v in zip((2, 3, 4), p, strict=True)) == pytest.approx(mean, 1e-6)
        assert p[1] ** 2 == pytest.approx(p[0] * p[2], rel=1e-6, abs=1e-12)      # exp(lambda b)
    assert abs(sum(b * n for b, n in zip(drawn((2, 4), [3, 1], 2.5, Random(0)), [3, 1],
                                         strict=True)) / 4 - 2.5) < 1e-9      # by weights
    part, other = parse("llm_qfa")[0], parse("llm_qfa(seed=1)")[0]
    assert part.drawn(5, [1] * 20) == part.drawn(5, [1] * 20) != other.drawn(5, [1] * 20)


def test_a_sweep_goes_down_and_up():
    means = [swept(2, 4, step, 8, Random(step)) for step in range(8)]
    for step, m in enumerate(means):
        far = step if step < 4 else 7 - step
        assert 4 - 0.5 * (far + 1) <= m <= 4 - 0.5 * far


def test_within_a_budget():
    space = [(2, 3, 4), (2, 3, 4), (3,)]
    for seed in range(20):
        got = within((4, 4, 3), space, [1, 2, 1], 3.0, Random(seed))
        assert got[0] + 2 * got[1] + got[2] <= 12 and got[2] == 3
    assert within((4, 4, 3), space, [1, 2, 1], 9.0, Random(0)) == (4, 4, 3)
    assert within((4, 4, 3), space, [1, 2, 1], 0.0, Random(0)) == (2, 2, 3)
    met = []
    best = genetic([(2, 3)] * 3, lambda g: met.append(g) or sum(g), population=4, rounds=3,
                   mend=lambda g, draw: within(g, [(2, 3)] * 3, [1] * 3, 7 / 3, draw))
    assert sum(best) == 7 and all(sum(g) <= 7 for g in met) and len(met) == len(set(met))


def test_the_search_finds_the_layer_that_needs_its_bits():
    with torch.no_grad():                                   # the others are exact in any width
        base = [copy.deepcopy(m) for m in (nn.Linear(8, 8) for _ in range(3))]
        for i in (0, 2):
            base[i].weight.copy_(torch.eye(8))
    net = nn.Sequential(*base)
    x = torch.randn(64, 8)
    y = net(x).detach()
    tuned = burnish.tune(net, "llm_qfa(rank=1, group=8)", targets=["0", "1", "2"], head=False)
    part = tuned.recipe.named("llm_qfa")
    before = copy.deepcopy(tuned.tensors())
    found = part.lifecycle(tuned, [(x, y)], 8 / 3, loss=square, population=4, generations=4)
    assert found == {"0.weight": 2, "1.weight": 4, "2.weight": 2}
    assert {n: q.chosen for n, (q, _) in part.layers(tuned).items()} == found
    assert tuned.model.training
    less = part.lifecycle(tuned, [(x, y)], 7 / 3, loss=square, population=4, generations=4)
    assert less == {"0.weight": 2, "1.weight": 3, "2.weight": 2}, "never more than the budget"
    assert all(torch.equal(before[n], t) for n, t in tuned.tensors().items() if "extra" not in n)
    for budget, batches in ((1.9, [(x, y)]), (3.0, [])):
        with pytest.raises(ConfigError, match="expected at least 2 bits"):
            part.lifecycle(tuned, batches, budget, loss=square)


def test_a_search_is_of_32_configurations_16_times_where_nothing_is_said(monkeypatch):
    tuned, part = deep(3)
    asked = {}
    monkeypatch.setattr("burnish.methods.storage.llm_qfa.genetic",
                        lambda space, fitness, **kw: asked.update(kw) or (2, 2, 2))
    assert set(part.lifecycle(tuned, [(torch.ones(1, 8),) * 2], 3.0, loss=square).values()) == {2}
    assert (asked["population"], asked["rounds"], asked["seed"]) == (32, 16, 0)


def test_what_is_exported_has_the_size_of_the_formula_and_the_same_answers(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, SMALL)
    part = tuned.recipe.named("llm_qfa")
    tuned.optimizer(lr=1e-2)
    for _ in range(5):
        tuned.step(batch)
    net.eval()
    want = net(**batch).logits.detach()
    chosen = {n: q.chosen for n, (q, _) in part.layers(tuned).items()}
    assert len(set(chosen.values())) > 1
    whole = sum(q.nbytes for q, _ in part.layers(tuned).values())
    shapes = {p.name: p for p in tuned.anatomy.places}
    numbers = sum(shapes[n].numel for n in chosen)
    assert whole == numbers * 9 // 8 + 3 * 5 * numbers // 8
    assert part.export(tuned) == chosen
    for n, (held, _) in part.layers(tuned).items():
        size = shapes[n].numel * chosen[n] // 8 + 5 * shapes[n].numel // 8
        assert held.nbytes == part.size(shapes[n], chosen[n]) == size and \
            held.widths == (chosen[n],)
    assert sum(t.numel() for n, t in tuned.tensors().items() if "extra" not in n) == \
        sum(2 * (shapes[n].inp + shapes[n].out) for n in chosen)
    assert torch.equal(net(**batch).logits, want)
    tuned.save(tmp_path)
    again = load(tiny("llama")[0].eval(), tmp_path)
    assert torch.equal(again.model(**batch).logits, want)
    assert {n: q.widths for n, (q, _) in part.layers(again).items()} == \
        {n: (b,) for n, b in chosen.items()}
    with pytest.raises(ConfigError, match="bits, not"):
        part.choose(again, {next(iter(chosen)): 9})
    net.train()
    tuned.step(batch)                                       # and its factors train on
    assert {n: q.chosen for n, (q, _) in part.layers(tuned).items()} == chosen
    merged = tuned.merge()
    assert not any(".burnish." in n for n in merged.state_dict())


def test_what_a_file_holds_alone_is_all_that_room_is_made_for():
    """Of the widths that an export has left out nothing is drawn when it is read."""
    part, place = parse("llm_qfa(rank=3)")[0], Place("0", "weight", "linear", 9, 20)
    for settled, ranks in (({}, (3, 3, 3)), ({"bits": 3}, (0, 3, 0))):
        term = part.delta(Site(place, torch.ones(9, 20), settled=settled, places=[place]))
        assert tuple(len(term.factors_of(b)[0]) for b in (2, 3, 4)) == ranks


def test_a_merged_update_is_not_exported():
    tuned, part = deep(2)
    tuned.merge()
    with pytest.raises(ConfigError, match="merged"):
        part.export(tuned)


def test_a_file_says_what_answers(tmp_path):
    tuned, part = deep(3)
    stir(tuned)
    x = torch.randn(2, 8)
    part.choose(tuned, {"0.weight": 2, "1.weight": 3})
    want = tuned.model(x).detach()
    tuned.save(tmp_path)
    torch.manual_seed(0)
    again = load(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), tmp_path)
    assert torch.equal(again.model(x), want)
    assert [q.chosen for q, _ in part.layers(again).values()] == [2, 3, 4]


def test_a_choice_is_whole_or_not_at_all():
    tuned, part = deep(2)
    for wrong, says in (({"0.weight": 2, "1.weight": 5}, "not in 5"),
                        ({"0.weight": 2, "1.weigth": 2}, "1.weight")):
        with pytest.raises(ConfigError, match=says):
            part.choose(tuned, wrong)
        assert [(q.chosen, t.chosen) for q, t in part.layers(tuned).values()] == [(4, 4)] * 2


def test_the_least_and_the_most_are_legal():
    made = parse("llm_qfa(bits='2-8', group=0, every=1)")[0]
    assert (made.widths, made.group, made.every) == ((2, 8), 0, 1)


@pytest.mark.parametrize("text", ["bits='two-4'", "bits=''", "bits='3'", "bits='3-3'",
                                  "bits='1-4'", "bits='2-9'", "bits='2,4'", "group=-1",
                                  "every=0", "dropout=1.0", "draw='uniform', every=8"])
def test_refusals(text):
    with pytest.raises(RecipeError, match="llm_qfa"):
        parse(f"llm_qfa({text})")


@pytest.mark.parametrize("bits", ["two-4", "", "2-", "3-x"])
def test_what_is_no_list_of_widths_is_told_what_one_looks_like(bits):
    with pytest.raises(RecipeError, match="expected two or more different widths.*'2-3-4'"):
        parse(f"llm_qfa(bits={bits!r})")


def test_what_does_not_fit_is_refused():
    with pytest.raises(RankError, match="largest rank there is 9"):
        one("llm_qfa(rank=10)")
    tuned, _, _, _ = one()
    with pytest.raises(RecipeError, match="no part of the recipe"):
        parse("llm_qfa(rank=3)")[0].choose(tuned, {})
    with pytest.raises(BurnishError, match="two storages|grid"):
        burnish.tune(tiny("llama")[0], "nf4 + llm_qfa(rank=2)")
    with pytest.raises(BurnishError, match="slice"):
        burnish.tune(tiny("timm_qkv")[0], SMALL, targets="q,v")
