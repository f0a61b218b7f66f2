"""IST: which layers of an adapter train, and the scores that say so."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.engine.around import Pass
from burnish.fit import state
from burnish.formats.adapter import load
from burnish.methods.controller import ist as module
from burnish.testing import stir, tiny

PATHS = [f"model.layers.{k}" for k in range(4)]


def start(settings="", layers=4, beside="lora(rank=2)", lr=1e-2, **kw):
    torch.manual_seed(0)
    net, batch = tiny("llama", num_hidden_layers=layers)
    tuned = burnish.tune(net, f"{beside} + ist({settings})", head=False, **kw)
    tuned.optimizer(lr=lr, weight_decay=0.1)
    return tuned, batch


def turns(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "ist")


def by_layer(tuned):
    """{path of a block: its tensors}"""
    return {path: {n: p for n, p in tuned.model.named_parameters()
                   if n.startswith(f"{path}.") and ".burnish." in n} for path in PATHS}


def test_who_rests_is_not_moved_by_decay_or_momentum():
    tuned, batch = start("layers=2, every=1")
    stir(tuned)
    rested = 0
    for k in range(6):
        before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
        moments = {p: copy.deepcopy(s) for p, s in tuned.current_optimizer.state.items()}
        live = turns(tuned).schedule.live
        tuned.step(batch)
        live = turns(tuned).draw(2, -1, k, 0) if live is None else live
        assert len(live) == 2
        for path, tensors in by_layer(tuned).items():
            for n, p in tensors.items():
                assert torch.equal(p, before[n]) == (path not in live), n
                if path not in live and p in moments:
                    rested += 1
                    now = tuned.current_optimizer.state[p]
                    assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(v))
                               for k, v in moments[p].items()), "its state stays as it was"
        asleep = [p for path in PATHS if path not in turns(tuned).schedule.live
                  for p in by_layer(tuned)[path].values()]
        assert asleep and all(p.grad is None and not p.requires_grad for p in asleep)
    assert rested


def losses(tuned, batch, sets, factor):
    """Of every set, with the scale of its chains changed by hand."""
    found, was = [], tuned.model.training
    tuned.model.eval()
    for names in sets:
        chains = [t for n, t in tuned.terms(Chain) if n.startswith(tuple(f"{p}." for p in names))]
        for t in chains:
            t.scale *= factor
        with torch.no_grad():
            found.append(float(tuned.model(**batch).loss))
        for t in chains:
            t.scale /= factor
    tuned.model.train(was)
    return found


def test_scores_by_hand():
    """u_l += rate sum_k r_k p_l (1 - p_l), r_k = exp(-loss_k) less the mean, p before."""
    tuned, batch = start("every=1, rate=7, suppression=0.5, suppressed=2, candidates=3",
                         beside="lora(rank=2, dropout=0.3)")
    tuned.model.train()                              # and yet nothing drops where it looks
    stir(tuned, size=0.3)
    t, u = turns(tuned), dict.fromkeys(PATHS, 0.0)
    assert t.scores == u
    for k in range(3):
        sets = t.sets(k)
        assert len(sets) == len(set(sets)) == 3 and {len(s) for s in sets} == {2}
        rewards = [math.exp(-v) for v in losses(tuned, batch, sets, 0.5)]
        mean, p = sum(rewards) / 3, {n: 1 / (1 + math.exp(-v)) for n, v in u.items()}
        for names, r in zip(sets, rewards, strict=True):
            for n in names:
                u[n] += 7 * (r - mean) * p[n] * (1 - p[n])
        tuned.step(batch)
        assert t.scores == pytest.approx(u, rel=1e-5, abs=1e-9)
        assert any(u.values())


def test_equal_rewards_leave_the_scores_as_they_are():
    tuned, batch = start("every=1, rate=7, suppression=0.5, suppressed=2, candidates=3",
                         beside="lora(rank=2)")
    for _ in range(3):                               # B = 0: whoever is held down, the same loss
        t = turns(tuned)
        with torch.no_grad():
            for p in tuned.parameters():
                p.zero_()
        tuned.step(batch)
        assert not any(t.scores.values())


def test_looking_leaves_no_trace():
    tuned, batch = start("every=1", beside="lora(rank=2, dropout=0.3)")
    stir(tuned, size=0.3)
    plain, _ = start("rate=0", beside="lora(rank=2, dropout=0.3)")
    stir(plain, size=0.3)
    for one in (tuned, plain):
        one.model.train()
        torch.manual_seed(5)
        one.step(batch)
    assert turns(tuned).schedule.live == turns(plain).schedule.live
    for (n, a), (_, b) in zip(tuned.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), f"{n}: the same random numbers, the same scaling, the same mode"
    assert all(m.training for m in tuned.model.modules())


def test_holding_down_reaches_branches_and_chains_and_leaves_functions_of_w():
    """Half of what a branch adds is the branch at half its weight; of DoRA the lengths stay."""
    for beside, acts in (("parallel(bottleneck=4)", True), ("dora(rank=2)", True),
                         ("oft(block=4)", False)):
        tuned, batch = start("rate=0", beside=beside)
        stir(tuned, size=0.3)
        tuned.model.eval()
        step = Pass(tuned, lambda: None, lambda: None)
        with torch.no_grad():
            whole = tuned.model(**batch).logits
            tuned.timeline.start(None)
            with step.damped(PATHS, 0.5) as many:
                half = tuned.model(**batch).logits
            again = tuned.model(**batch).logits
            if beside.startswith("parallel"):
                tuned.use({"default": 0.5}, train=None)
                want = tuned.model(**batch).logits
                torch.testing.assert_close(half, want)
            with pytest.raises(ZeroDivisionError), step.damped(PATHS[:1], 0.0):
                raise ZeroDivisionError
        assert bool(many) is acts and torch.equal(half, whole) is not acts
        assert torch.equal(again, whole), "and then it counts whole again"
        assert all(p.damp == 1 for m in tuned.model.modules() for p in getattr(m, "parts", ()))


def test_a_layer_that_does_nothing_trains_less_often():
    """What block 2 adds is nothing; the others have learned the batch without it."""
    tuned, batch = start("layers=4, suppressed=1, candidates=4, rate=50, every=1000", lr=3e-2)
    idle = [t for n, t in tuned.terms(Chain) if n.startswith("model.layers.2.")]
    for _ in range(40):
        tuned.step(batch)
        with torch.no_grad():
            for t in idle:
                t.B.zero_()
    t = turns(tuned)
    t.scores = dict.fromkeys(PATHS, 0.0)
    step = Pass(tuned, lambda: None, lambda: tuned.steps.loss(batch, None))
    for k in range(5):
        step.index = k
        t.score(step)
    assert max(t.scores, key=t.scores.get) == PATHS[2] and t.scores[PATHS[2]] > 0, t.scores


def test_draws_are_in_proportion_to_the_scores():
    tuned, _ = start("layers=1, suppressed=1")
    t = turns(tuned)
    t.scores = {PATHS[0]: 3.0, PATHS[1]: 0.0, PATHS[2]: 0.0, PATHS[3]: -3.0}
    s = {n: 1 / (1 + math.exp(-u)) for n, u in t.scores.items()}
    trains, held = Counter(), Counter()
    for k in range(3000):
        trains.update(t.draw(1, -1, k, 0))
        held.update(t.draw(1, 1, k, 1))
    for n in PATHS:
        assert trains[n] / 3000 == pytest.approx((1 - s[n]) / (4 - sum(s.values())), abs=0.03)
        assert held[n] / 3000 == pytest.approx(s[n] / sum(s.values()), abs=0.03)
    t.scores = {PATHS[0]: 1e4, PATHS[1]: -1e4, PATHS[2]: 0.0, PATHS[3]: 0.0}
    assert t.draw(1, 1, 0, 0) != {PATHS[1]}, "however large they are"


def test_who_trains_is_drawn_against_the_scores():
    """Blocks that can be held down without harm train less often."""
    tuned, batch = start("layers=1, every=1000")
    t, often = turns(tuned), Counter()
    tuned.step(batch)
    t.scores = {PATHS[0]: 0.7, PATHS[1]: 40.0, PATHS[2]: -0.7, PATHS[3]: 0.0}
    for k in range(2, 26):
        tuned.step(batch)                            # at its end stands who trains in the next
        assert t.schedule.live == t.draw(1, -1, k, 0)
        often.update(t.schedule.live)
    assert not often[PATHS[1]] and often[PATHS[2]] > often[PATHS[0]] > 0


def test_a_stale_basis_does_not_wait_for_its_block():
    tuned, batch = start("layers=1, rate=0")
    t, state = turns(tuned), tuned.current_optimizer.state
    for _ in range(8):
        tuned.step(batch)
    rests = [p for p in t.schedule.groups[next(n for n in PATHS if n not in t.schedule.live)]
             if p in state]
    for n in PATHS:
        for p in t.schedule.groups[n]:
            state[p]["projector.Q"] = torch.eye(2)
    tuned.step(batch)
    assert rests
    for n in PATHS:
        for p in t.schedule.groups[n]:
            assert ("projector.Q" in state[p]) is (n in t.schedule.live)


def test_candidates_are_the_first_draws_that_differ():
    t = turns(start("suppressed=2")[0])
    t.scores = dict(zip(PATHS, (0.7, 1.5, -0.7, 0.0), strict=True))
    for k in range(20):
        drawn = list(dict.fromkeys(t.draw(2, 1, k, nth) for nth in range(1, 30)))
        assert t.sets(k) == drawn[:3]


def test_a_quarter_trains_and_half_is_held_down():
    tuned, _ = start(layers=9)
    assert (turns(tuned).count, turns(tuned).held) == (2, 4)
    tuned, _ = start(layers=2)
    assert (turns(tuned).count, turns(tuned).held) == (1, 1)
    assert len(turns(tuned).sets(0)) == 2, "there are no more"
    tuned, _ = start("layers=3, suppressed=1")
    assert (turns(tuned).count, turns(tuned).held) == (3, 1)
    tuned, batch = start(layers=32)                          # as many as LLaMA-7B has
    tuned.step(batch)
    assert (turns(tuned).count, turns(tuned).held, len(turns(tuned).schedule.live)) == (8, 16, 8)
    assert {len(s) for s in turns(tuned).sets(0)} == {16} and len(turns(tuned).sets(0)) == 3


def test_scores_change_every_so_often_and_once_an_update():
    tuned, batch = start("every=3, rate=100")
    stir(tuned, size=0.3)
    seen = [dict(turns(tuned).scores)]
    for _ in range(7):
        opt = tuned.current_optimizer
        opt.zero_grad()
        tuned.backward(batch)
        first = dict(turns(tuned).scores)
        tuned.backward(batch)
        assert turns(tuned).scores == first, "not by the second micro-batch"
        opt.step()
        seen.append(first)
    assert [a != b for a, b in zip(seen[:-1], seen[1:], strict=True)] == \
        [True, False, False, True, False, False, True]


def test_uniform_draws_look_at_nothing():
    tuned, batch = start("rate=0")
    runs = []
    tuned.model.register_forward_hook(lambda *a: runs.append(1))
    for _ in range(3):
        tuned.step(batch)
    assert len(runs) == 3 and not any(turns(tuned).scores.values())
    scored, _ = start("every=2")
    scored.model.register_forward_hook(lambda *a: runs.append(1))
    for _ in range(3):
        scored.step(batch)
    assert len(runs) == 3 + 3 + 2 * 3


def test_what_stands_outside_the_blocks_always_trains():
    torch.manual_seed(0)
    net, batch = tiny("llama", num_hidden_layers=4)
    tuned = burnish.tune(net, "lora(rank=2) + ist(layers=1, rate=0)", head=True)
    tuned.optimizer(lr=1e-2)
    head = net.lm_head.weight
    for _ in range(3):
        before = head.detach().clone()
        tuned.step(batch)
        assert head.requires_grad and not torch.equal(head, before)


def test_a_promise_has_the_state_of_all_and_the_lowest_train():
    tuned, _ = start("layers=2")
    t = turns(tuned)
    t.scored = 4
    t.rehearse(0)
    assert t.schedule.live == set(PATHS) and t.scored is None
    t.rehearse(1)
    assert t.schedule.live == set(PATHS[:2])


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(stop, tmp_path):
    ends = []
    for cut in (None, stop):
        tuned, batch = start("every=2, rate=100, layers=2")
        for k in range(5):
            if k == cut:
                tuned.save(tmp_path / "a", whole=True)
                tree = {"optimizer": state.optimizer_state(tuned.current_optimizer,
                                                           list(tuned.model.named_parameters())),
                        "timeline": tuned.timeline.state()}
                state.save_tree(tree, tmp_path, "run")
                kept = state.load_tree(tmp_path, "run")
                torch.manual_seed(0)
                tuned = load(tiny("llama", num_hidden_layers=4)[0], tmp_path / "a")
                tuned.optimizer(lr=1e-2, weight_decay=0.1)
                state.load_optimizer_state(tuned.current_optimizer,
                                           tuned.model.named_parameters(), kept["optimizer"])
                tuned.timeline.load(kept["timeline"])
            tuned.step(batch)
        ends.append((tuned.tensors(), turns(tuned).scores, turns(tuned).schedule.live))
    assert all(torch.equal(t, ends[1][0][n]) for n, t in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:] and any(ends[0][1].values())


# -- what it says ----------------------------------------------------------------------------------
def test_the_defaults():
    assert parse("lora + ist")[1].settings() == {
        "targets": None, "layers": 0, "suppressed": 0, "candidates": 3, "suppression": 0.25,
        "rate": 10.0, "every": 10, "seed": 0}
    assert parse("lora + ist(mu=3)")[1].rate == 3


@pytest.mark.parametrize("settings", ["layers=-1", "suppressed=-1", "rate=-1", "candidates=1",
                                      "every=0", "suppression=1", "suppression=-0.1"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(RecipeError, match="^ist: layers, suppressed"):
        parse(f"lora + ist({settings})")


@pytest.mark.parametrize("settings", ["candidates=2", "every=1", "suppression=0", "rate=0"])
def test_settings_at_their_bounds_are_taken(settings):
    assert parse(f"lora + ist({settings})")


@pytest.mark.parametrize("settings", ["suppressed=2", "candidates=2", "suppression=0.5", "every=2"])
def test_what_only_scoring_reads_is_refused_without_it(settings):
    with pytest.raises(RecipeError, match=f"^ist: {settings.split('=')[0]} does nothing at rate"):
        parse(f"lora + ist(rate=0, {settings})")


@pytest.mark.parametrize("settings, what", [("layers=5", "5 layers train and 2 are held"),
                                            ("suppressed=5", "1 layers train and 5 are held")])
def test_more_layers_than_there_are_are_refused(settings, what):
    with pytest.raises(RecipeError, match=f"^ist: {what} down, of the 4 blocks"):
        start(settings)


def test_one_block_with_something_to_train_is_refused():
    with pytest.raises(RecipeError, match="of the 1 blocks"):
        start(targets="model.layers.0.self_attn.q_proj")


def test_what_cannot_be_held_down_is_refused():
    for beside in ("full", "oft(block=4)"):
        with pytest.raises(RecipeError, match=r"^ist holds .* in model.layers.0 there is none"):
            start(beside=beside)
        tuned, batch = start("rate=0", beside=beside)
        assert tuned.step(batch).isfinite()
    for beside in ("parallel(bottleneck=4)", "dora(rank=2)"):
        assert start(beside=beside)


def test_several_processes_would_choose_otherwise(monkeypatch):
    monkeypatch.setattr(module, "processes", lambda: 2)
    with pytest.raises(ConfigError, match="^ist scores layers"):
        start()
    assert start("rate=0")


def test_a_block_that_rests_is_not_scored_by_what_stands_beside():
    tuned, batch = start("layers=1, rate=0", beside="increlora(rank=4)")
    for _ in range(4):
        assert tuned.step(batch).isfinite()
