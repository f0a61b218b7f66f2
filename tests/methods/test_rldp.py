"""RLDP: clips and noise of a policy, within a budget that no choice of noise exceeds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.soft_actor import GAMMA, RHO, SoftActor
from burnish.blocks.update.accountant import sigma_for
from burnish.blocks.update.filters import ORDERS, Filter, allowed, best, planned, rdp
from burnish.blocks.update.private import ClippedApart
from burnish.core.errors import ConfigError, RecipeError

C, SIGMA, B, LR, ROWS = 0.7, 0.4, 3.0, 0.1, 100


def mse(out, batch):
    return (out - batch[1]).square().mean()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(n=4, rows=3, bad=0.0):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 6, generator=g).double(),
             (3 + bad) * torch.randn(rows, 3, generator=g).double()) for _ in range(n)]


def tuned(more="", recipe="full", total=None, sigma=f"sigma={SIGMA}", method="rldp"):
    t = burnish.tune(net(), f"{recipe} + {method}({sigma}, max_norm={C}, batch={B}, "
                            f"records={ROWS}{more}) + sgd", head=True)
    t.total_steps = total
    t.optimizer(LR)
    return t


def hand_of(t):
    return next(h for _, h in t.timeline.handlers if hasattr(h, "filter"))


# -- the equation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
def test_a_constant_policy_is_plain_dp_bit_for_bit(recipe):
    one = tuned(", per_place=False, swing=1", recipe)
    other = tuned("", recipe, method="dp")
    for t in (one, other):
        torch.manual_seed(7)
        for b in batches():
            t.step(b, mse)
    for (n, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_step_is_the_equation_place_by_place():
    """Each place is cut to its own norm and has noise of its own norm, larger by sqrt(J)."""
    t = tuned(", swing=1")
    by_hand = copy.deepcopy(t.model)
    torch.manual_seed(7)
    x, y = batches()[0]
    t.step((x, y), mse)
    groups = [list(by_hand[0].parameters()), list(by_hand[2].parameters())]
    names = [{n.partition(".")[0] for n, p in by_hand.named_parameters()
              if any(p is q for q in g)} for g in groups]
    assert names == [{"0"}, {"2"}]
    total = [[torch.zeros_like(p) for p in g] for g in groups]
    for i in range(len(x)):
        loss = mse(by_hand(x[i:i + 1]), (None, y[i:i + 1]))
        grads = torch.autograd.grad(loss, [p for g in groups for p in g])
        for k, pair in enumerate((grads[:2], grads[2:])):
            size = sum(float(g.square().sum()) for g in pair)**0.5
            for to, g in zip(total[k], pair, strict=True):
                to += g * min(1.0, C / size)
    torch.manual_seed(7)
    with torch.no_grad():
        for g, sums in zip(groups, total, strict=True):
            for p, s in zip(g, sums, strict=True):
                noise = torch.randn(p.shape, dtype=p.dtype) * SIGMA * math.sqrt(2) * C
                p -= LR * (s + noise) / B
    for p, q in zip(t.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_no_sample_moves_the_scaled_sum_by_more_than_the_root_of_the_groups():
    g = torch.Generator().manual_seed(3)
    groups = [[nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))],
              [nn.Parameter(torch.zeros(3))], [nn.Parameter(torch.zeros(5))]]
    bounds = [0.3, 2.0, 0.01]
    for size in (1e-3, 1.0, 1e4):
        with ClippedApart(groups, bounds) as sums:
            for p in sums.params:
                p.grad = size * torch.randn(p.shape, generator=g)
            sums.take()
        scaled = sum(float(p.grad.square().sum()) / c**2
                     for one, c in zip(groups, bounds, strict=True) for p in one)**0.5
        assert scaled <= math.sqrt(3) * (1 + 1e-6)
        for p in sums.params:
            p.grad = None


# -- the budget ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.01), (1.5, 0.2), (4.0, 1.0)])
def test_moments_are_those_of_the_library(sigma, rate):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    noise = dp_accounting.GaussianDpEvent(sigma)
    event = noise if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, noise)
    for order in (2, 3, 17, 64, 256):
        accountant = RdpAccountant(orders=[order]).compose(event, 50)
        want = accountant.get_epsilon(1e-5)
        mine = 50 * rdp(sigma, rate, order) - allowed(0.0, 1e-5, order)
        assert max(0.0, mine) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_plan_is_the_library_s_but_for_orders_between():
    for epsilon in (0.5, 2.0, 8.0):
        sigma, order = planned(epsilon, 0.05, 300, 1e-5)
        assert order in ORDERS and best(sigma, 0.05, 300, 1e-5)[0] <= epsilon
        want = sigma_for(epsilon, 0.05, 300, 1e-5, "rdp")
        assert want * 0.999 <= sigma <= want * 1.03


@pytest.mark.parametrize("seed", range(6))
def test_the_filter_stops_before_the_contract_whatever_noise_is_chosen(seed):
    """Noise of an adversary: tiny, growing, whatever; the exact sum stays within."""
    g = torch.Generator().manual_seed(seed)
    sigma, order = planned(2.0, 0.05, 100, 1e-5)
    f, made = Filter(2.0, 1e-5, 0.05, order), []
    for k in range(2000):
        wish = sigma * float(torch.exp(torch.randn((), generator=g) * (1 + seed))) + 1e-3
        before = f.spent
        try:
            f.charge(wish)
        except ConfigError as error:
            assert "would spend more than epsilon=2" in str(error)
            assert f.spent == before                             # and is not made
            if k > 20 and rdp(wish, 0.05, order) < 1e-3:
                break
            continue
        made.append(wish)
    spent = sum(rdp(s, 0.05, order) for s in made)
    assert made and spent - allowed(0.0, 1e-5, order) <= 2.0 * (1 + 1e-8)
    assert f.told() <= 2.0 * (1 + 1e-8)


def test_the_least_noise_leaves_the_rest_of_the_plan_affordable():
    sigma, order = planned(2.0, 0.05, 100, 1e-5)
    f, most = Filter(2.0, 1e-5, 0.05, order), 4 * sigma
    left = 100
    while left:                                                  # as greedy as it may be
        here = min(10, left)
        left -= here
        low = f.least(here, left, most)
        assert low <= most
        for _ in range(here):
            f.charge(low)
    assert f.spent <= f.budget
    with pytest.raises(ConfigError):
        f.charge(0.5 * most)


@pytest.mark.parametrize("greed", [-1.0, 1.0])
def test_a_run_makes_its_updates_within_epsilon_whatever_the_policy_wants(greed, monkeypatch):
    monkeypatch.setattr(SoftActor, "act", lambda self, s: torch.full((self.actions,), greed))
    t = tuned(", epsilon=2, every=3, hidden=4", total=20, sigma="risk=1e-3")
    for k in range(20):
        t.step(batches()[k % 4], mse)
    told = hand_of(t).told()
    assert 0 < told["epsilon"] <= 2 * (1 + 1e-8) and told["updates"] == 20
    if greed < 0:
        assert told["epsilon"] > 1.2                             # it was spent at once
    with pytest.raises(ConfigError, match="20 updates that the noise was made for"):
        t.step(batches()[0], mse)


def test_without_an_end_noise_is_never_below_the_plan():
    t = tuned(", every=2, hidden=4", total=None)
    for k in range(12):
        t.step(batches()[k % 4], mse)
        assert hand_of(t).sigma >= SIGMA
    assert hand_of(t).clips != [1.0, 1.0]


# -- what it sees ----------------------------------------------------------------------------------
def test_equal_sums_with_noise_are_equal_states(monkeypatch):
    """What is told of samples is what has its noise: other samples, of the same noisy sums, leave
    the same states, rewards and actions."""
    from burnish.methods.controller import rldp as module

    g = torch.Generator().manual_seed(5)
    drawn = [[torch.randn(p.shape, generator=g).double() for p in net().parameters()]
             for _ in range(8)]
    seen = []
    for bad in (0.0, 50.0):
        count = iter(range(8 * 4))

        def told(params, size, batch, count=count):
            for p in params:
                k = next(count)
                p.grad = drawn[k // 4][k % 4].clone()

        monkeypatch.setattr(module, "hide", told)
        t = tuned(", every=2, hidden=4", total=8, sigma="epsilon=3")
        for b in batches(8, bad=bad):
            t.step(b, mse)
        h = hand_of(t)
        seen.append((h.state, h.action, h.clips, h.sigma, [one[2] for one in h.policy.seen]))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert len(seen[0][4]) == 3


def test_the_gain_is_the_fall_of_the_loss_along_the_path():
    """-<g_t, theta_t - theta_(t-1)> summed, with hardly any noise and no clipping: the loss falls
    by that, to first order."""
    t = burnish.tune(net(), "full + rldp(sigma=1e-6, max_norm=1e4, batch=3, records=100, every=50, "
                            "hidden=4) + sgd", head=True)
    t.optimizer(1e-3)
    b = batches()[0]
    losses = [float(t.step(b, mse)) for _ in range(30)]
    assert hand_of(t).window["gain"] == pytest.approx(losses[0] - losses[-1], rel=0.05)


def test_what_trains_is_held_once_more_and_no_more_than_that():
    """Behind the first update as well: the copy is moved in its place."""
    t = tuned(", every=2, hidden=4", total=8, sigma="epsilon=3")
    t.step(batches()[0], mse)
    where = {n: c.data_ptr() for n, c in hand_of(t).before.items()}
    assert set(where) == {n for n, _ in t.named_parameters()}
    for b in batches():
        now = {n: p.detach().clone() for n, p in t.named_parameters()}
        t.step(b, mse)
        for n, copied in hand_of(t).before.items():
            assert copied.data_ptr() == where[n] and torch.equal(copied, now[n])


# -- going on --------------------------------------------------------------------------------------
def test_it_goes_on_where_it_stood():
    def run(stop):
        t = tuned(", every=2, hidden=4", total=16, sigma="epsilon=3", recipe="lora(rank=2)")
        torch.manual_seed(11)
        for k in range(16):
            if k == stop:
                state, drawn = copy.deepcopy(hand_of(t).state_dict()), torch.get_rng_state()
                other = tuned(", every=2, hidden=4", total=16, sigma="epsilon=3",
                              recipe="lora(rank=2)")
                with torch.no_grad():
                    for p, q in zip(other.parameters(), t.parameters(), strict=True):
                        p.copy_(q)
                hand_of(other).load_state_dict(state)
                torch.set_rng_state(drawn)
                t = other
            t.step(batches()[k % 4], mse)
        return t

    whole, cut = run(None), run(9)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(p, q)
    assert hand_of(whole).sigma == hand_of(cut).sigma
    assert len(hand_of(cut).policy.seen) == 7


@pytest.mark.parametrize(("text", "match"), [
    ("rldp(sigma=1, epsilon=2)", "give one"), ("rldp(swing=0.5)", "swing of 1 or more"),
    ("rldp(hidden=0)", "every and hidden of 1 or more"),
    ("rldp(price=-1.0)", "price of 0 or more"),
    ("rldp(every=0)", "every and hidden of 1 or more"), ("rldp(accountant='pld')", "accountant")])
def test_what_cannot_be_is_refused_when_it_is_read(text, match):
    with pytest.raises(RecipeError, match=match):
        burnish.parse(text)


def test_the_least_that_acts():
    least = burnish.parse("rldp(every=1, hidden=1, swing=1.0, price=0.0)")[0]
    assert (least.every, least.hidden, least.swing, least.price) == (1, 1, 1.0, 0.0)
    for endless in ({"swing": float("inf")}, {"price": float("inf")}):
        with pytest.raises(RecipeError, match="swing of 1 or more, price of 0 or more"):
            type(least)(**endless)


def test_what_is_not_known_is_asked_for_before_anything_moves():
    t = tuned("", total=None, sigma="epsilon=2")
    before = [p.detach().clone() for p in t.model.parameters()]
    with pytest.raises(ConfigError, match="keeps within a budget"):
        t.step(batches()[0], mse)
    assert all(map(torch.equal, before, t.model.parameters()))


# -- the policy ------------------------------------------------------------------------------------
def test_the_policy_s_density_is_that_of_its_actions():
    """log pi(a | s) against the change of variables, by autograd, in float64."""
    p = SoftActor(3, 2, 8, seed=1)
    with torch.no_grad():
        for w in p.actor.parameters():
            w.add_(0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)))
    s = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    a, log = p.policy(s)
    m, scale = p.actor(s).double().chunk(2, -1)
    scale = scale.clamp(-5, 1)
    u = torch.atanh(a.double())
    normal = torch.distributions.Normal(m, scale.exp()).log_prob(u)
    want = (normal - torch.log1p(-u.tanh().square())).sum(-1)
    torch.testing.assert_close(log.double(), want, rtol=1e-3, atol=1e-3)
    assert SoftActor(3, 2, 8, seed=1).actor(s)[:, :2].abs().max() == 0


def test_it_learns_what_is_rewarded_and_targets_follow_slowly():
    p = SoftActor(2, 1, 16, seed=0, lr=3e-2)
    g = torch.Generator().manual_seed(0)
    s = torch.zeros(2)
    for _ in range(200):
        a = 2 * torch.rand(1, generator=g) - 1
        p.remember(s, a, -10 * float((a - 0.6).square()), s)
    old = [q.clone() for q in p.targets.parameters()]
    p.learn()
    for before, now, live in zip(old, p.targets.parameters(), p.critics.parameters(), strict=True):
        torch.testing.assert_close(now, before + RHO * (live - before))
    for _ in range(300):
        p.learn()
    mean = float(p.actor(s[None])[0, 0].detach().tanh())
    assert abs(mean - 0.6) < 0.3 and 0 < GAMMA < 1
