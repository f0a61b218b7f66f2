"""TriAdaptLoRA: a triangular core against its equation, and how it grows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.triangular import Triangular, core_blocks, core_size
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.formats.placed import put
from burnish.testing import follows, stir
from burnish.testing.models import tiny

BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}


def made(settings, rank=None, inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"triadaptlora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Triangular)
    return model, tuned, term


def core(lower, upper, blocks):
    """C written out entry by entry: blocks (a, r_i)."""
    r, C, k = blocks[-1][1], {}, 0
    for a, now in blocks:
        for i in range(now - a, now):
            for j in range(now):
                C[i, j] = C.get((i, j), 0) + lower[k]
                C[j, i] = C.get((j, i), 0) + upper[k]
                k += 1
    return torch.stack([torch.stack([C[i, j] for j in range(r)]) for i in range(r)])


@pytest.mark.parametrize("init, grow, rank, blocks", [
    (1, 1, 4, [(1, 1), (1, 2), (1, 3), (1, 4)]), (2, 3, 7, [(2, 2), (3, 5), (2, 7)]),
    (3, 2, 3, [(3, 3)])])
def test_outputs_and_gradients_are_those_of_the_equation(init, grow, rank, blocks):
    model, tuned, term = made(f"rank={rank}, init_rank={init}, grow={grow}, alpha=6")
    assert core_blocks(init, grow, rank) == blocks
    while term.rank < rank:
        n = min(grow, rank - term.rank)
        tuned.resize(term, fresh=term.fresh(n, torch.ones))
        term.grown(n)
    term.double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=1.0)
    assert term.lower.numel() == core_size(init, grow, rank) == sum(a * r for a, r in blocks)
    s = 6 / (rank + 1e-5)

    def equation(x, A, B, lower, upper):
        return F.linear(x, W + s * B @ core(lower, upper, blocks) @ A, bias)

    follows(tuned, equation, [term.A, term.B, term.lower, term.upper], (5, 3, 12))
    C = core(term.lower, term.upper, blocks)
    torch.testing.assert_close(term.extent(), C.square().sum().sqrt() / len(blocks))
    A, B = term.pair()
    torch.testing.assert_close(B @ A, s * term.B @ C @ term.A)


def test_it_starts_as_the_base_with_gradients_in_the_core():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200))
    x = torch.randn(4, 300)
    want = model(x)
    tuned = burnish.tune(model, "triadaptlora(rank=60, init_rank=30)", targets="0", head=False)
    (_, term), = tuned.terms(Triangular)
    assert torch.equal(model(x), want) and not term.core().any()
    for t in (term.A, term.B):
        assert float(t.detach().std()) == pytest.approx(0.02, rel=0.05)
    model(x).square().sum().backward()
    assert term.lower.grad.any() and term.upper.grad.any() and not term.A.grad.any()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_counts_on_a_base_size_encoder():
    """Six linears of twelve blocks: 1,327,104 in the factors at rank 8, and 5,184 in the cores."""
    places = match(Anatomy.of(tiny("bert", meta=True, **BERT_BASE)[0]), None)
    (method,) = parse("triadaptlora(grow=1)")
    assert len(places) == 72
    assert sum(method.count(p, rank=8) for p in places) == 1_327_104 + 72 * 72
    assert 72 * 72 == 5_184
    place = places[0]
    assert method.count(place) == place.out + place.inp + 2
    assert (method.per_token(place), method.per_token(place, rank=3)) == (8, 3)
    (half,) = parse("triadaptlora")
    assert half.count(place, rank=8) == 8 * (place.out + place.inp) + 2 * (1 + 4 * 5 + 3 * 8)
    assert half.settings() == {
        "targets": None, "rank": 8, "init_rank": 1, "grow": None, "law": "linear", "warmup": 0.1,
        "every": 100, "alpha": 16.0, "ortho": 0.1, "preserve": False}
    assert [parse(f"triadaptlora(rank={r})")[0].step for r in (1, 2, 3, 8, 64)] == [1, 1, 1, 4, 32]


STEPS = 20
SMALL = "triadaptlora(rank=4, grow=2, warmup=0.2, every=3)"


def start(recipe=SMALL, total=STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                          nn.Linear(16, 8))
    tuned = burnish.tune(model, recipe, targets="all", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=2e-2)
    return tuned


def terms(tuned):
    return dict(tuned.terms(Triangular))


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, 12, generator=g)
    return tuned.step((x, x[:, :8]), loss=lambda out, b: (out - b[1]).square().mean())


@pytest.mark.parametrize("law", ["linear", "power"])
def test_those_whose_norm_rose_most_grow_until_the_ranks_are_spent(law):
    tuned = start(SMALL.replace(")", f", law={law!r})"))
    assert next(h for _, h in tuned.timeline.handlers).linear == (law == "linear")
    before, seen = dict.fromkeys(terms(tuned), 0.0), []
    for k in range(STEPS):
        ranks = {n: t.rank for n, t in terms(tuned).items()}
        handler = next(h for _, h in tuned.timeline.handlers)
        norms = {}
        original = handler.after_update

        def look(s, norms=norms, original=original):
            norms.update({n: float(t.core().detach().norm()) / len(core_blocks(1, 2, t.rank))
                          for n, t in terms(tuned).items()})
            original(s)

        handler.after_update = look
        step(tuned, k)
        del handler.after_update
        left, done = 12 - sum(ranks.values()), k + 1
        want = dict(ranks)
        if left and done >= 4 and (done - 4) % 3 == 0:
            c = (done - 4) / 16
            top = max(1, int(left * c) if law == "linear" else int(left**c))
            for n in sorted(ranks, key=lambda n: before[n] - norms[n])[:top]:
                more = min(2, left)
                want[n] += more
                left -= more
            before = norms
        assert {n: t.rank for n, t in terms(tuned).items()} == want
        seen.append(sum(want.values()))
    # (done - 4) / 16 of 9, 7, 5, ... : one each at 4, 7 and 10; of 3 left at 13 one, which is last
    assert seen[:4] == [3, 3, 3, 5] and seen[-1] == 12
    model = tuned.model
    x = torch.randn(3, 12)
    want = model(x).detach()
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-4, atol=1e-6)


def test_without_a_known_length_nothing_grows():
    tuned = start(total=None)
    for k in range(8):
        step(tuned, k)
    assert {t.rank for t in terms(tuned).values()} == {1}


@pytest.mark.parametrize("preserve", [True, False])
def test_growth_changes_the_function_by_its_scale_alone(preserve):
    tuned = start(f"triadaptlora(rank=6, init_rank=2, grow=2, preserve={preserve})")
    stir(tuned, size=0.5)
    x = torch.randn(5, 12)
    model = tuned.model
    handler = next(h for _, h in tuned.timeline.handlers)
    was, base = model(x).detach(), {n: t.dense().detach() for n, t in terms(tuned).items()}
    handler.rise(0, 3)
    assert {t.rank for t in terms(tuned).values()} == {4}
    factor = 1.0 if preserve else (2 + 1e-5) / (4 + 1e-5)
    for n, t in terms(tuned).items():
        torch.testing.assert_close(t.dense(), base[n] * factor, rtol=1e-5, atol=1e-7)
    if preserve:
        torch.testing.assert_close(model(x), was, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at", [5, 8])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(at):
    whole = start()
    for k in range(at):
        step(whole, k)
    saved = copy.deepcopy((whole.timeline.state(), whole.tensors(),
                           whole.current_optimizer.state_dict()))
    assert len({t.rank for t in terms(whole).values()}) > 1
    for k in range(at, STEPS):
        step(whole, k)
    second = start(total=None)
    put(second, saved[1], "memory")
    second.current_optimizer.load_state_dict(saved[2])
    second.timeline.load(saved[0])
    for k in range(at, STEPS):
        step(second, k)
    for (n, a), b in zip(whole.tensors().items(), second.tensors().values(), strict=True):
        assert torch.equal(a, b), n


def test_a_file_brings_its_ranks(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, SMALL, head=False)
    tuned.total_steps = STEPS
    tuned.optimizer(lr=1e-2)
    for _ in range(9):
        tuned.step(batch)
    want = {n: t.rank for n, t in terms(tuned).items()}
    assert len(set(want.values())) > 1
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    assert {n: t.rank for n, t in terms(again).items()} == want
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_a_promise_is_of_the_ranks_in_the_end():
    net, batch = tiny("llama")
    least = burnish.simulate(net, "triadaptlora(rank=1)", batch)
    most = burnish.simulate(net, "triadaptlora(rank=8)", batch)
    assert most.trainable > 7 * least.trainable and most.peak_bytes > least.peak_bytes
    tuned = burnish.tune(net, "triadaptlora(rank=8)")
    tuned.optimizer(lr=1e-3)
    took = burnish.measure(tuned, batch)
    assert abs(most.peak_bytes / took.peak_bytes - 1) < 0.03
    assert {t.rank for t in terms(tuned).values()} == {1}       # and back again


def test_the_orthogonality_term():
    tuned = start("triadaptlora(rank=4, init_rank=2, ortho=0.3)")
    stir(tuned, size=0.5)
    values = [o.value() for o in parse("triadaptlora(ortho=0.3)")[0].objective(tuned, None)]
    want = sum(torch.linalg.matrix_norm(g - torch.eye(2)) for t in terms(tuned).values()
               for g in (t.A @ t.A.t(), t.B.t() @ t.B)) * 0.3 / 6
    torch.testing.assert_close(sum(values), want)


@pytest.mark.parametrize("settings", ["rank=1, init_rank=1", "grow=1, every=1, warmup=0"])
def test_settings_at_their_bounds_are_taken(settings):
    assert parse(f"triadaptlora({settings})")


@pytest.mark.parametrize("settings", ["rank=1, init_rank=2", "init_rank=0", "warmup=-0.1",
                                      "warmup=1", "grow=0", "every=0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^triadaptlora"):
        parse(f"triadaptlora({settings})")


def test_refusals():
    with pytest.raises(burnish.RecipeError, match="the budget of ranks"):
        parse("triadaptlora + triadaptlora(rank=2)")
    with pytest.raises(burnish.RecipeError, match="adam8bit"):
        parse("triadaptlora + adam8bit")
    with pytest.raises(RankError, match="rank 10 does not fit"):
        made("rank=10, init_rank=10")
    place = Place("l", "weight", "linear", 3, 7)
    assert Triangular(place, 1, 1, 1, 1.0, False).most == 3
    assert Triangular(place, 2, 1, 1, 1.0, False).settled() == {"rank": 2}
