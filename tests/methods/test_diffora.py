"""DiffoRA: gates that train, and the updates that stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.gates import GATES, Search
from burnish.blocks.weight.gated import Gated
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.formats.placed import put
from burnish.testing import follows, stir
from burnish.testing.models import tiny

ROBERTA_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12}


def made(settings="rank=4, alpha=6", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"diffora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Gated)
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    term.double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    stir(tuned, size=1.0)
    follows(tuned, lambda x, A, B, gate: F.linear(
        x, W + 2 / (1 + torch.exp(-gate)) * 1.5 * B @ A, bias), [term.A, term.B, term.gate],
        (5, 3, 12))
    tuned.resize(term, keep={"gate": torch.arange(0)})
    assert term.decided and term.settled() == {"rank": 4, "gates": 0}
    follows(tuned, lambda x, A, B, gate: F.linear(x, W + 1.5 * B @ A, bias) + gate.sum(),
            [term.A, term.B, term.gate], (5, 12))


def test_an_update_of_rank_nothing_is_nothing_and_keeps_nothing(kept):
    model, tuned, term = made()
    stir(tuned, size=1.0)
    tuned.resize(term, keep=torch.arange(0))
    assert not term.keeps_input and term.decided
    x = torch.randn(5, 12).double().requires_grad_()
    want = F.linear(x, model[0].weight, model[0].bias)
    got = model(x)
    assert torch.equal(got, want)
    assert term.forward_(x.detach(), got.detach().clone(), 1.0) == ()
    assert Gated(Place("l", "weight", "linear", 9, 12), 1, 1.0).keeps_input
    got.sum().backward()
    assert [p.grad.shape for p in (term.A, term.B, term.gate)] == [(0, 12), (9, 0), (0,)]
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(5, 12))
    assert torch.equal(tuned.merge()(x), want)


def test_start_counts_and_defaults():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 200))
    x = torch.randn(4, 400)
    want = model(x)
    tuned = burnish.tune(model, "diffora(rank=60)", targets="0", head=False)
    (_, term), = tuned.terms(Gated)
    assert torch.equal(model(x), want) and not term.B.any() and term.gate.tolist() == [0.0]
    A = term.A.detach()
    assert -400**-0.5 <= float(A.min()) < -0.049 and 0.049 < float(A.max()) <= 400**-0.5
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.05)
    groups = tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
    assert {g["weight_decay"] for g in groups} == {0.0}
    assert {g["lr"] for g in groups} == {1e-3, 5e-3}
    places = match(Anatomy.of(tiny("roberta", meta=True, **ROBERTA_BASE)[0]), None)
    (method,) = parse("diffora")
    assert len(places) == 72
    assert sum(method.count(p) - method.count(p, gates=0) for p in places) == 72
    place = Place("l", "weight", "linear", 24, 16)
    assert (method.count(place), method.count(place, rank=3, gates=0)) == (8 * 40 + 1, 120)
    assert (method.per_token(place), method.per_token(place, rank=0)) == (8, 0)
    assert method.settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "density": 0.5, "warmup": 0.05, "search": 0.3,
        "gate_rate": 5.0}


STEPS = 20
SMALL = "diffora(rank=2, warmup=0.1, search=0.5)"


def start(recipe=SMALL, total=STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                          nn.Linear(16, 8))
    tuned = burnish.tune(model, recipe, targets="all", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=2e-2)
    return tuned


def terms(tuned):
    return dict(tuned.terms(Gated))


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, 12, generator=g)
    return tuned.step((x, x[:, :8]), loss=lambda out, b: (out - b[1]).square().mean())


def test_gates_and_factors_take_turns_and_then_it_is_decided():
    tuned = start()
    mine = terms(tuned)
    for k in range(STEPS):
        was = {n: [p.detach().clone() for p in t.theta()] for n, t in mine.items()}
        gates = {n: float(t.gate.detach()) if not t.decided else None for n, t in mine.items()}
        step(tuned, k)
        if k == 9:
            break
        state = tuned.current_optimizer.state
        assert all((t.B in state, t.gate in state) == (True, k >= 2) for t in mine.values()), k
        for n, t in mine.items():
            moved = [not torch.equal(a, b) for a, b in zip(was[n], t.theta(), strict=True)]
            turn = k in (2, 4, 6, 8)                    # from update 2 of 20 on, until 10
            assert moved[1:] == [not turn, turn], k
            assert moved[0] == (not turn and k > 0), k
    # round(0.5 * 3) = 2 of three matrices stay: those with the largest gates
    stay = sorted(gates, key=lambda n: -gates[n])[:2]
    optimizer = tuned.current_optimizer
    for n, t in mine.items():
        assert t.decided and t.rank == (2 if n in stay else 0)
        assert not t.B.any() and not any(p in optimizer.state for p in t.theta())
        assert t.rank == 0 or not torch.equal(t.A, was[n][0])
        assert t.rank == 0 or 0.8 < float(t.A.detach().abs().max()) * t.inp**0.5 <= 1
        assert t.rank == 0 or t.A.detach().min() < 0 < t.A.detach().max()
    drawn = [t.A.detach().flatten()[:4] for t in mine.values() if t.rank]
    assert not torch.equal(*drawn)
    for k in range(10, STEPS):
        step(tuned, k)
    assert all(t.B.any() for n, t in mine.items() if n in stay)
    (method,) = parse(SMALL)
    final = sum(method.count(Place(n, "weight", "linear", t.out, t.inp), rank=t.rank, gates=0)
                for n, t in mine.items())
    assert final == sum(2 * (t.out + t.inp) for n, t in mine.items() if n in stay) \
        == sum(p.numel() for p in tuned.parameters())
    assert {n for n, _ in tuned.named_parameters()} == {
        n for n, p in tuned.model.named_parameters() if p.numel() and ".burnish." in n}
    x = torch.randn(3, 12)
    want = tuned.model(x).detach()
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-4, atol=1e-6)


def test_a_projection_of_factors_that_rest_is_made_anew():
    tuned = start()
    for k in range(2):
        step(tuned, k)
    state = tuned.current_optimizer.state
    for t in terms(tuned).values():
        state[t.B]["folded"] = torch.ones(())
    next(h for n, h in tuned.timeline.handlers if n == "diffora").step_begin(2)
    assert all("folded" not in state[t.B] and "exp_avg" in state[t.B]
               for t in terms(tuned).values())


def test_without_a_known_length_it_is_lora():
    tuned = start(total=None)
    for k in range(8):
        step(tuned, k)
    assert {(t.rank, float(t.gate.detach())) for t in terms(tuned).values()} == {(2, 0.0)}
    assert all(t.B.any() for t in terms(tuned).values())


@pytest.mark.parametrize("at", [5, 10, 14])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(at):
    whole = start()
    for k in range(at):
        step(whole, k)
    saved = copy.deepcopy((whole.timeline.state(), whole.tensors(),
                           whole.current_optimizer.state_dict()))
    for k in range(at, STEPS):
        step(whole, k)
    second = start(total=None)
    put(second, saved[1], "memory")
    second.current_optimizer.load_state_dict(saved[2])
    second.timeline.load(saved[0])
    for k in range(at, STEPS):
        step(second, k)
    assert whole.tensors().keys() == second.tensors().keys()
    for (n, a), b in zip(whole.tensors().items(), second.tensors().values(), strict=True):
        assert torch.equal(a, b), n


class Two(nn.Module):
    """Two linears side by side; what is to be learnt is a change of the second alone."""

    def __init__(self, which):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        g = torch.Generator().manual_seed(5)
        self.change = 0.6 * torch.randn(8, 2, generator=g) @ torch.randn(2, 8, generator=g)
        self.which = which

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)


@pytest.mark.parametrize("which", [0, 1])
def test_a_planted_change_is_found(which):
    net = Two(which)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "diffora(rank=2, search=0.6)", targets="all", head=False)
    tuned.total_steps = 60
    tuned.optimizer(lr=1e-2)
    for k in range(40):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(k))
        y = base(x).detach()
        y[:, 8 * which : 8 * which + 8] += x @ net.change.t()
        # noise on the other, which has nothing to learn
        y += 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(k + 1000))
        tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())
    assert [t.rank for t in terms(tuned).values()] == [2 * (which == i) for i in range(2)]


def test_a_block_decides_for_itself_and_a_file_says_who_stayed(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "diffora(rank=2, density=0.3, search=0.4)", head=False)
    tuned.total_steps = 10
    tuned.optimizer(lr=1e-2)
    for _ in range(6):
        tuned.step(batch)
    per = {}
    for t in terms(tuned).values():
        per.setdefault(t.block, []).append(t.rank)
    assert {b: sum(r) for b, r in per.items()} == {0: 4, 1: 4}     # round(0.3 * 7) = 2 of rank 2
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    assert {n: t.rank for n, t in terms(again).items()} == \
        {n: t.rank for n, t in terms(tuned).items()}
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    again.total_steps = 10
    again.optimizer(lr=1e-2)
    for _ in range(5):                                     # a run that goes on decides no more
        again.step(batch)
    assert sum(t.rank for t in terms(again).values()) == 8


def test_measuring_between_two_updates_puts_what_was_decided_back():
    ends = []
    for measured in (False, True):
        tuned = start()
        for k in range(9):
            step(tuned, k)
        if measured:
            x = torch.randn(6, 12)
            burnish.measure(tuned, (x, x[:, :8]),
                            loss=lambda out, b: (out - b[1]).square().mean())
            assert {t.rank for t in terms(tuned).values()} == {2}
        for k in range(9, 12):
            step(tuned, k)
        ends.append(tuned.tensors())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("settings", ["density=0", "density=1.1", "warmup=-0.1", "search=1",
                                      "warmup=0.5, search=0.5", "gate_rate=0", "gate_rate=1e999"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^diffora"):
        parse(f"diffora({settings})")


def test_refusals():
    assert parse("diffora(density=1, warmup=0, search=0.01, gate_rate=0.1)")
    with pytest.raises(burnish.RecipeError, match="which updates stay"):
        parse("diffora + diffora(rank=2)")
    with pytest.raises(burnish.RecipeError, match="adam8bit"):
        parse("diffora + adam8bit")
    with pytest.raises(RankError, match="rank 10 does not fit"):
        made("rank=10")


# -- the handler alone -----------------------------------------------------------------------------
def handler(values, **kw):
    mine = {}
    for i, v in enumerate(values):
        term = Gated(Place(str(i), "weight", "linear", 5, 6, block=i // 3), 2, 1.0)
        term.gate.data.fill_(v)
        mine[str(i)] = term
    how = {"warmup": 0.1, "search": 0.5, "density": 0.5, "label": "x"} | kw
    return Search(mine, None, lambda: None, **how)


def test_who_is_chosen_in_each_block():
    assert handler([0.1, 0.3, 0.2, 0.0, 0.0, -1.0]).chosen() == {"1", "2", "3", "4"}
    assert handler([0.1, 0.3, 0.2, 0.0], density=0.1).chosen() == {"1", "3"}
    assert len(handler([0.1] * 6, density=1.0).chosen()) == 6


def test_turns():
    h = handler([0.0] * 3)
    assert h.live(0) == h.live(5) == {"0", "1", "2"}       # the length is not known
    h.start(40)
    assert h.turns() == range(4, 20)
    assert [k for k in range(40) if h.live(k) == {GATES}] == list(range(4, 20, 2))
    h.start(3)
    assert h.turns() == range(1, 2)
    close = handler([0.0] * 3, warmup=0.38, search=0.4)    # both are four of ten: one at least
    close.start(10)
    assert close.turns() == range(4, 5)
    h.start(2)                                             # no update would be left
    assert not h.turns() and h.live(1) == {"0", "1", "2"}
    h.after_update(1)
