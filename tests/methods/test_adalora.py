"""AdaLoRA: triplets that compete, pruned to a cubic budget."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.methods.delta.rank.adalora import Triplets
from burnish.testing.models import tiny

BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}
RECIPE = "adalora(rank=2, init_rank=5, warmup=0.2, cooldown=0.3, every=2)"
STEPS = 20


@pytest.mark.parametrize("rank, expected", [(8, 1_327_104 + 576), (2, 331_776 + 144)])
def test_counts_on_a_base_size_encoder(rank, expected):
    """The six linears of twelve blocks: 165,888 per rank and 72 values."""
    anatomy = Anatomy.of(tiny("bert", meta=True, **BERT_BASE)[0])
    places = match(anatomy, None)
    (method,) = parse(f"adalora(rank={rank}, init_rank={rank})")
    assert len(places) == 72 and sum(method.count(p) for p in places) == expected


def start(recipe=RECIPE, total=STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    tuned = burnish.tune(model, recipe, targets="all", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=2e-2)
    return tuned


def terms(tuned):
    return dict(tuned.terms(Triplets))


def pruner(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "adalora")


def alive(tuned):
    return sum(int((t.E != 0).sum()) for t in terms(tuned).values())


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 12, generator=g), torch.randn(16, 8, generator=g)
    return tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())


def test_budget_curve():
    """12 matrices, 12 -> 8: 144 until 10 %, 96 from 70 % on, a cube between."""
    made = {str(i): Triplets(Place("l", "w", "linear", 12, 12), 12, 1.0) for i in range(12)}
    tuned = SimpleNamespace(terms=lambda kind: made.items(), resize=None)
    p = parse("adalora(rank=8, init_rank=12, warmup=0.1, cooldown=0.3)")[0].controller(tuned)
    p.start(1000)
    assert [p.budget(t) for t in (0, 100, 700, 1000)] == [144, 144, 96, 96]
    for t in range(100, 701, 50):
        assert p.budget(t) == math.floor(96 + 48 * (1 - (t - 100) / 600) ** 3 + 1e-9)
    curve = [p.budget(t) for t in range(1001)]
    assert curve == sorted(curve, reverse=True)


def test_exactly_the_target_lives_after_the_final_phase():
    tuned = start()
    counts = []
    for k in range(STEPS):
        step(tuned, k)
        counts.append(alive(tuned))
    fixed = STEPS - int(0.3 * STEPS)
    assert counts[0] == 10 and counts[fixed:] == [4] * (STEPS - fixed)
    ranks = {n: t.E.numel() for n, t in terms(tuned).items()}            # findings 2.8
    assert sum(ranks.values()) == 4, "what was pruned is gone, not zero"
    for t in terms(tuned).values():
        r = t.E.numel()
        assert t.P.shape[1] == t.Q.shape[0] == r
        state = tuned.current_optimizer.state[t.P]
        assert state["exp_avg"].shape == t.P.shape
    step(tuned, STEPS)
    assert ranks == {n: t.E.numel() for n, t in terms(tuned).items()}


@pytest.mark.parametrize("settings", ["cooldown=0.0", "cooldown=0.0, every=7",
                                      "cooldown=0.01, warmup=0.9"])
def test_the_target_is_reached_without_a_final_phase(settings):
    recipe = f"adalora(rank=2, init_rank=5, {settings})"                        # findings 2.8
    tuned = start(recipe)
    for k in range(STEPS):
        assert sum(t.E.numel() for t in terms(tuned).values()) == 10, "for good only at the end"
        step(tuned, k)
    assert alive(tuned) == sum(t.E.numel() for t in terms(tuned).values()) == 4


def test_the_mask_follows_the_budget_at_every_interval():
    tuned = start()
    for k in range(14):
        step(tuned, k)
        if k > 4 and k % 2 == 0:
            assert alive(tuned) == pruner(tuned).budget(k)


def test_ties_keep_exactly_the_budget():
    tuned = start()
    step(tuned, 0)
    for smoothed in pruner(tuned).scores.values():
        for s in smoothed:
            s.mean.fill_(1.0)
            s.spread.fill_(1.0)
    for budget in range(11):
        assert sum(int(m.sum()) for m in pruner(tuned).pattern(budget).values()) == budget


def test_scores_by_hand():
    """S_i = s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij), s = I' U with the new I'."""
    tuned = start()
    want = {n: [[torch.zeros_like(p), torch.zeros_like(p)] for p in t.theta()]
            for n, t in terms(tuned).items()}
    for k in range(3):
        step(tuned, k)
        for n, t in terms(tuned).items():
            for pair, p in zip(want[n], t.theta(), strict=True):
                importance = (p.detach() * p.grad).abs()
                pair[0] = 0.85 * pair[0] + 0.15 * importance
                pair[1] = 0.85 * pair[1] + 0.15 * (importance - pair[0]).abs()
    rows = []
    for n in terms(tuned):
        P, E, Q = (a * b for a, b in want[n])
        rows.append(E + P.mean(0) + Q.mean(1))
    flat = torch.cat(rows)
    for budget in (1, 4, 9):
        got = torch.cat(list(pruner(tuned).pattern(budget).values()))
        assert set(got.nonzero().flatten().tolist()) == set(flat.topk(budget).indices.tolist())


def test_the_orthogonality_term():
    """ortho times the mean over all P and Q of ||P^T P - I||_F; and its gradient by hand:
    that of the squared form is 4 P (P^T P - I), of the norm that over twice the norm."""
    tuned = start("adalora(rank=2, init_rank=3, ortho=0.3)")
    with torch.no_grad():
        for t in terms(tuned).values():
            t.P.normal_()
            t.Q.normal_()
    (method,) = tuned.recipe
    total = sum(term.value() for term in method.objective(tuned, None))
    eye = torch.eye(3)
    want = 0.3 * torch.stack([torch.linalg.matrix_norm(m - eye) for t in terms(tuned).values()
                              for m in (t.P.t() @ t.P, t.Q @ t.Q.t())]).mean()
    torch.testing.assert_close(total, want)
    total.backward()
    for t in terms(tuned).values():
        off = (t.P.t() @ t.P - eye).detach()
        hand = 4 * t.P @ off / (2 * off.norm()) * 0.3 / 4
        torch.testing.assert_close(t.P.grad, hand.detach(), rtol=1e-5, atol=1e-6)
        assert t.E.grad is None


def test_the_term_joins_the_gradient_in_anybodys_loop():
    grads = []
    for ortho in (0.0, 0.5):
        tuned = start(f"adalora(rank=2, init_rank=3, ortho={ortho})")
        opt = tuned.current_optimizer
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
        tuned.model(x).square().mean().backward()
        opt.step()
        grads.append([t.P.grad.clone() for t in terms(tuned).values()])
    assert all(not torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_identity_and_merge():
    tuned = start()
    x = torch.randn(4, 12)
    with tuned.disabled():
        want = tuned.model(x)
    assert torch.equal(tuned.model(x), want)
    with torch.no_grad():
        for t in terms(tuned).values():
            t.E.normal_()
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-6)


def test_resumed_scores_and_pattern():
    whole = start()
    for k in range(16):                             # two steps into the fixed pattern
        step(whole, k)
    saved = copy.deepcopy((whole.timeline.state(), whole.tensors(),
                           whole.current_optimizer.state_dict()))
    for k in range(16, STEPS):
        step(whole, k)
    from burnish.formats.placed import put

    second = start()
    put(second, saved[1], "memory")
    second.current_optimizer.load_state_dict(saved[2])
    second.timeline.load(saved[0])
    for k in range(16, STEPS):
        step(second, k)
    for (n, a), b in zip(whole.tensors().items(), second.tensors().values(), strict=True):
        assert torch.equal(a, b), n


def test_without_a_known_length_nothing_is_pruned():
    tuned = start(total=None)
    for k in range(4):
        step(tuned, k)
    assert alive(tuned) == 10


def test_the_equation_written_out():                                       # findings 6
    """y = x W^T + b + s ((x Q^T) E) P^T, s = alpha / (r0 + 1e-5), in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).double()
    tuned = burnish.tune(model, "adalora(rank=2, init_rank=5, alpha=12)", head=False)
    ((_, term),) = tuned.terms(Triplets)
    # P and Q start normal with std 0.02, E at zero
    assert not term.E.any()
    assert 0.015 < float(torch.cat([term.P.flatten(), term.Q.flatten()]).detach().std()) < 0.025
    term.double()
    with torch.no_grad():
        for p in term.parameters():
            p.copy_(torch.randn(p.shape).double())
    P, E, Q = term.P, term.E, term.Q
    x = torch.randn(5, 24).double().requires_grad_()
    g = torch.randn(5, 16).double()
    s = 12 / (5 + 1e-5)
    y = x @ model[0].weight.t() + model[0].bias + s * ((x @ Q.t()) * E) @ P.t()
    got = model(x)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (P, E, Q, x), g),
                    torch.autograd.grad(y, (P, E, Q, x), g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


def test_defaults_are_the_published_ones():
    assert burnish.parse("adalora")[0].settings() == {
        "targets": None, "rank": 8, "init_rank": 12, "alpha": 16.0, "ortho": 0.1, "warmup": 0.1,
        "cooldown": 0.3, "dropout": 0.0, "every": 10}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "adalora(rank=2, init_rank=3)",
                         targets="0", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


def test_what_a_token_keeps_besides_the_input():
    place = Place("l", "weight", "linear", 24, 16)
    assert burnish.parse("adalora(rank=2, init_rank=5)")[0].per_token(place) == 5


@pytest.mark.parametrize("settings", ["rank=1, init_rank=1", "rank=3, init_rank=3", "every=1",
    "warmup=0.0, cooldown=0.0", "warmup=0.5, cooldown=0.4"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"adalora({settings})")


@pytest.mark.parametrize("settings", ["rank=4, init_rank=3", "rank=0", "every=0", "warmup=-0.1",
    "cooldown=-0.1", "warmup=0.5, cooldown=0.5"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^adalora"):
        burnish.parse(f"adalora({settings})")


def test_two_that_share_one_budget_are_refused():
    with pytest.raises(burnish.RecipeError, match="the budget of triplets"):
        burnish.parse("adalora + adalora(rank=2)")


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 17 does not fit"):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), "adalora(init_rank=17)",
                     targets="0", head=False)


def test_the_count_of_a_rank():
    (method,) = parse("adalora(rank=2, init_rank=5)")
    place = Place("l", "weight", "linear", 24, 16)
    assert (method.count(place), method.count(place, rank=3)) == (5 * 41, 3 * 41)


def test_scores_are_given_back_once_the_pattern_is_fixed():
    """They hold two floats per parameter: none of them outlives the last choice, nor a resume."""
    tuned = start()
    made = [weakref.ref(s) for ss in pruner(tuned).scores.values() for s in ss]
    for k in range(15):
        step(tuned, k)
    gc.collect()
    assert pruner(tuned).fixed and not any(r() for r in made)
    state = copy.deepcopy(pruner(tuned).state_dict())
    assert state["scores"] == {} and state["fixed"] is True
    again = start()
    made = [weakref.ref(s) for ss in pruner(again).scores.values() for s in ss]
    pruner(again).load_state_dict(state)
    gc.collect()
    assert not any(r() for r in made)


@pytest.mark.parametrize("word", ["dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), targets="0", head=False, recipe=(
        f"adalora(rank=2, init_rank=3, {word}=0.25)"))
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^adalora: {word} is a probability"):
            burnish.parse(f"adalora({word}={p})")
