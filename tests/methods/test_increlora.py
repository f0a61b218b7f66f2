"""IncreLoRA against its equations in plain float64, and how it grows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.site import Place
from burnish.methods.delta.rank.increlora import Growing
from burnish.testing.models import tiny

SMALL = "increlora(rank=3, top=5, warmup=2, every=2"


def one(settings="rank=4, init_rank=2, grow=1"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    tuned = burnish.tune(net, f"increlora({settings})", targets="0", head=False)
    net[0].burnish.double()
    term = net[0].burnish.default["increlora"]
    with torch.no_grad():
        for p in term.parameters():
            p.copy_(torch.randn_like(p))
    return net, tuned, term


def test_outputs_gradients_and_score_are_the_equations():
    net, tuned, term = one()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    P, E, Q = (getattr(term, n).detach().clone().requires_grad_() for n in "PEQ")
    s = 16 / (2 + 1e-5)
    delta = s * P @ torch.diag(torch.cat([E, torch.tensor([1e-5], dtype=torch.float64)])) @ Q
    delta.retain_grad()
    W, b = net[0].weight.detach(), net[0].bias.detach()
    y, want = net(x), x2 @ (W + delta).t() + b
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(y)
    term.scoring = True
    y.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-8, atol=1e-11)
    for mine, ref in ((term.P, P), (term.E, E), (term.Q, Q)):
        torch.testing.assert_close(mine.grad, ref.grad, rtol=1e-8, atol=1e-12)
    total = float((delta.detach() * delta.grad).abs().sum())
    assert float(term.score) == pytest.approx(total, rel=1e-10)
    assert float(term.importance()) == pytest.approx(total / 30 ** 0.5, rel=1e-10)   # 5 x 6


def run(recipe, steps, model="llama", total=None):
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-2)
    tuned.total_steps = total
    ranks = []
    for _ in range(steps):
        tuned.step(batch)
        ranks.append([t.E.numel() for _, t in tuned.terms(Growing)])
    return net, batch, tuned, ranks


@pytest.mark.parametrize("advance", [True, False])
def test_ranks_rise_to_the_target_exactly_and_the_waiting_go(advance):
    net, batch, tuned, ranks = run(f"{SMALL}, advance={advance})", 20)
    sums = [sum(r) for r in ranks]
    n = len(ranks[0])
    assert sums[0] == n and sums[-1] == 3 * n
    for a, b in zip(ranks, ranks[1:], strict=False):
        assert all(x <= y <= x + 1 for x, y in zip(a, b, strict=True))
        assert sum(y - x for x, y in zip(a, b, strict=True)) in (0, 5, 2 * n % 5)
    grown = [i + 1 for i, (a, b) in enumerate(zip([n, *sums], sums, strict=False)) if b > a]
    assert grown == list(range(2, 2 + 2 * len(grown), 2))
    assert all(t.waiting == 0 for _, t in tuned.terms(Growing))
    net.eval()
    want = net(**batch).logits
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-5)


def test_the_matrices_of_the_highest_smoothed_score_grow():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"{SMALL})")
    terms = dict(tuned.terms(Growing))
    tuned.optimizer(lr=1e-2)
    mean = dict.fromkeys(terms, 0.0)
    spread = dict.fromkeys(terms, 0.0)
    for _ in range(2):
        loss = tuned.loss(batch)
        now = {}
        for t in terms.values():
            t.score = 0.0
        loss.backward()
        for n, t in terms.items():
            now[n] = float(t.score) / (t.P.shape[0] * t.Q.shape[1]) ** 0.5
            mean[n] = 0.85 * mean[n] + 0.15 * now[n]
            spread[n] = 0.85 * spread[n] + 0.15 * abs(now[n] - mean[n])
        tuned.current_optimizer.step()
        tuned.current_optimizer.zero_grad()
    want = set(sorted(terms, key=lambda n: -mean[n] * spread[n])[:5])
    assert {n for n, t in terms.items() if t.E.numel() == 2} == want


def test_preserving_growth_changes_nothing():
    net, batch, tuned, _ = run(
        "increlora(rank=4, init_rank=2, top=99, warmup=99, every=1, preserve=True)", 3)
    net.eval()
    with torch.no_grad():
        for _, t in tuned.terms(Growing):
            t.E.normal_()
    want = net(**batch).logits
    handler = next(h for n, h in tuned.timeline.handlers if n == "increlora")
    handler.rise(3)
    assert all(t.E.numel() == 3 for _, t in tuned.terms(Growing))
    torch.testing.assert_close(net(**batch).logits, want, rtol=0, atol=1e-5)


def test_it_starts_as_the_base():
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "increlora(advance=False)")
    assert torch.equal(net(**batch).logits, want)
    other, _ = tiny("llama")
    other.eval()
    burnish.tune(other, "increlora")
    torch.testing.assert_close(other(**batch).logits, want, rtol=0, atol=1e-4)


def test_a_saved_run_comes_back_with_its_ranks(tmp_path):
    net, batch, tuned, ranks = run(f"{SMALL})", 5)
    assert len(set(ranks[-1])) > 1
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    assert [t.E.numel() for _, t in again.terms(Growing)] == ranks[-1]
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_a_run_too_short_to_grow_is_refused_before_its_first_update():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "increlora(rank=3)")
    tuned.total_steps = 40
    tuned.optimizer(lr=1e-2)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    with pytest.raises(burnish.RecipeError, match="grows from update 1000 on, and the run has 40"):
        tuned.step(batch)
    assert all(torch.equal(before[n], p) for n, p in tuned.named_parameters())


def test_rounds_and_the_count_on_a_base_size_encoder():
    """72 matrices from rank 1 to 8 on average, 18 a time: 28 growths, the last as large."""
    from types import SimpleNamespace

    (method,) = burnish.parse("increlora")
    terms = {str(i): Growing(Place(str(i), "weight", "linear", 24, 24), 1, 0, 16.0, False)
             for i in range(72)}

    def resize(term, keep=None, fresh=None):
        if fresh:                                          # at the end those that wait would go
            term.E = nn.Parameter(torch.cat([term.E.detach(), fresh["E"]]))

    made = SimpleNamespace(terms=lambda kind: terms.items(), resize=resize)
    handler, rounds = method.controller(made), 0
    while handler.left > 0:
        for name, smoothed in handler.scores.items():
            smoothed.update(torch.tensor([float(int(name) * 7 % 72 + rounds % 5)]))
        handler.rise(rounds)
        rounds += 1
    assert rounds == -(-(576 - 72) // 18) == 28
    assert sum(t.E.numel() for t in terms.values()) == 576
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    places = [Place("a", "weight", "linear", o, i) for o, i in shapes]
    assert 12 * sum(method.count(p, rank=8, waiting=0) for p in places) == 1_327_104 + 576


def test_the_count_with_what_waits():
    method = burnish.parse("increlora(rank=8)")[0]
    p = Place("x", "weight", "linear", 768, 3072)
    assert method.count(p) == 2 * (768 + 3072) + 1
    assert method.count(p, rank=8, waiting=0) == 8 * (768 + 3072 + 1)
    (without,) = burnish.parse("increlora(rank=8, advance=False)")
    assert without.count(p) == 768 + 3072 + 1


def test_defaults_are_the_published_ones():
    assert burnish.parse("increlora")[0].settings() == {
        "targets": None, "rank": 8, "init_rank": 1, "grow": 1, "top": 18, "warmup": 1000,
        "every": 1000, "alpha": 16.0, "ortho": 0.1, "advance": True, "preserve": False}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "increlora(rank=2)", targets="0",
                         head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("settings", ["rank=1, init_rank=1", "rank=2, init_rank=2", "warmup=0",
    "grow=1, top=1, every=1"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"increlora({settings})")


@pytest.mark.parametrize("settings", ["rank=1, init_rank=2", "init_rank=0", "warmup=-1", "grow=0",
    "top=0", "every=0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^increlora"):
        burnish.parse(f"increlora({settings})")


def test_two_that_share_one_budget_are_refused():
    with pytest.raises(burnish.RecipeError, match="the budget of triplets"):
        burnish.parse("increlora + adalora")


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 17 does not fit"):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), "increlora(rank=17, init_rank=17)",
                     targets="0", head=False)


def grower(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "increlora")


@pytest.mark.parametrize("advance, free", [(True, 1e-5), (False, 0.0)])
def test_new_components_are_drawn_small_and_come_all_but_without_effect(advance, free):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200))
    tuned = burnish.tune(net, f"increlora(rank=60, grow=29, warmup=1, every=1, advance={advance})",
                         targets="0", head=False)
    tuned.optimizer(lr=0.0)
    (_, term), = tuned.terms(Growing)
    for ranks in ([1, 30], [30, 59], [59, 60]):                   # the last growth is what is left
        assert term.E.numel() == ranks[0]
        old = {n: getattr(term, n).detach().clone() for n in "PEQ"}
        tuned.step((torch.randn(4, 300), None), loss=lambda out, _: out.square().mean())
        assert term.E.numel() == ranks[1]
        w, P, Q = old["P"].shape[1], term.P.detach(), term.Q.detach()
        if ranks[1] < 60:
            assert torch.equal(P[:, :w], old["P"]) and torch.equal(Q[:w], old["Q"])
            for fresh in (P[:, w:], Q[w:]):
                assert float(fresh.std()) == pytest.approx(0.02, rel=0.05)
        E = term.E.detach()
        assert torch.equal(E[: ranks[0]], old["E"])
        assert torch.equal(E[ranks[0]:], torch.full((ranks[1] - ranks[0],), free))
    assert term.P.shape == (200, 60) and term.Q.shape == (60, 300) and not term.scoring


def test_a_matrix_of_full_rank_grows_no_further():
    """Whatever its score: the others take what is left."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20), nn.Linear(20, 20))
    tuned = burnish.tune(net, "increlora(rank=3, top=3, warmup=1, every=1)", targets="*",
                         head=False)
    tuned.optimizer(lr=1e-3)
    for _ in range(8):
        tuned.step((torch.randn(4, 20), None), loss=lambda out, _: out.square().mean())
    assert [t.E.numel() for _, t in tuned.terms(Growing)] == [2, 2, 5]


def test_a_resumed_run_scores_only_while_it_grows():
    _, _, tuned, _ = run(f"{SMALL})", 3)
    state = grower(tuned).state_dict()
    assert all(t.scoring for _, t in tuned.terms(Growing))
    for _, t in tuned.terms(Growing):
        t.scoring = False
    grower(tuned).load_state_dict(state)
    assert all(t.scoring and t.score == 0 for _, t in tuned.terms(Growing))
    _, batch, tuned, ranks = run(f"{SMALL})", 20)
    assert sum(ranks[-1]) == 3 * len(ranks[-1])
    assert not any(t.scoring for _, t in tuned.terms(Growing))


def test_growth_draws_alike_for_like_places_and_steps():
    """A run twice from one seed is the same run; two matrices get different components."""
    runs = [run(f"{SMALL})", 3)[2] for _ in range(2)]
    for (n, a), b in zip(runs[0].tensors().items(), runs[1].tensors().values(), strict=True):
        assert torch.equal(a, b), n
    grown = [t for _, t in runs[0].terms(Growing) if t.E.numel() == 2]
    assert len({float(t.P.detach()[0, -1]) for t in grown}) == len(grown) == 5


def test_measuring_between_two_updates_puts_ranks_and_scores_back():
    """Two runs, one measured in the middle while matrices grow: they end alike."""
    ends = []
    for measured in (False, True):
        net, batch, tuned, ranks = run("increlora(rank=3, top=5, warmup=1, every=1)", 2)
        if measured:
            burnish.measure(tuned, batch)
            assert [t.E.numel() for _, t in tuned.terms(Growing)] == ranks[-1]
        for _ in range(3):
            tuned.step(batch)
        ends.append(tuned.tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
