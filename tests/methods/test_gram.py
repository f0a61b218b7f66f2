"""GRAM: derivatives of the outer loss against finite differences, and what is frozen after."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import burnish
from burnish.blocks.update.regulated import Regulation
from burnish.blocks.weight.clustered import clusters
from burnish.core.recipe import parse
from burnish.methods.lifecycle.gram import Gram
from burnish.testing.models import tiny


def joined(model="vit", recipe="vpt(length=2, dropout=0.0)"):
    net, batch = tiny(model, dtype=torch.float64, batch=4)
    tuned = burnish.tune(net, recipe, head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    keys = [k for k, v in batch.items() if isinstance(v, torch.Tensor)]
    support, query = ({k: batch[k][i:i + 2] for k in keys} for i in (0, 2))
    psi = Regulation(dict(tuned.named_parameters())).double()
    g = torch.Generator().manual_seed(2)
    for p in psi.parameters():
        p.data.add_(3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return tuned, support, query, psi


def by_hand(tuned, psi, support, query, rate, updates):
    """L_query(theta') with theta moved in place, by autograd's plain gradients."""
    params = dict(tuned.named_parameters())
    kept = {n: p.detach().clone() for n, p in params.items()}
    for _ in range(updates):
        grads = torch.autograd.grad(tuned.loss(support), list(params.values()))
        with torch.no_grad():
            for p, g in zip(params.values(), grads, strict=True):
                gate = psi.width[str(p.shape[-1])]
                p -= rate * 2 * torch.sigmoid(g @ gate.weight.t() + gate.bias) * g
    value = float(tuned.loss(query).detach())
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(kept[n])
    return value


@pytest.mark.parametrize("updates, recipe", [
    (0, "vpt(length=2, dropout=0.0)"), (1, "vpt(length=2, dropout=0.0)"),
    (2, "vpt(length=2, dropout=0.0)"), (1, "prefix(length=2)")])
def test_second_order_derivatives_are_those_of_finite_differences(updates, recipe):
    tuned, support, query, psi = joined(recipe=recipe)
    method = Gram(inner_rate=0.5, inner_updates=updates)
    value = method.query(tuned, psi, support, query)
    assert float(value.detach()) == pytest.approx(by_hand(tuned, psi, support, query, 0.5, updates),
                                                  rel=1e-10)
    theta, phi = list(tuned.parameters()), list(psi.parameters())
    grads = torch.autograd.grad(value, [*theta, *phi], allow_unused=updates == 0)
    g = torch.Generator().manual_seed(9)
    for k, p in enumerate([*theta, *phi]):
        if grads[k] is None:
            continue
        v = torch.randn(p.shape, generator=g, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            p.data.add_(v, alpha=sign * 1e-5)
            ends.append(by_hand(tuned, psi, support, query, 0.5, updates))
            p.data.add_(v, alpha=-sign * 1e-5)
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((grads[k] * v).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-10)
    assert all(g is None for g in grads[len(theta):]) == (updates == 0)


def test_first_order_takes_gradients_as_numbers():
    tuned, support, query, psi = joined()
    first, second = (Gram(inner_rate=0.5, order=o).query(tuned, psi, support, query)
                     for o in ("first", "second"))
    assert float(first.detach()) == pytest.approx(float(second.detach()), rel=1e-12)
    (p,), phi = list(tuned.parameters()), list(psi.parameters())
    a = torch.autograd.grad(first, [p, *phi])
    b = torch.autograd.grad(second, [p, *phi])
    assert not torch.allclose(a[0], b[0], rtol=1e-4)
    for x, y in zip(a[1:], b[1:], strict=True):          # the gate is reached either way
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)
    there = p.detach() - 0.5 * psi(torch.autograd.grad(tuned.loss(support), p)[0]).detach()
    here, p.data = p.data, there
    want = torch.autograd.grad(tuned.loss(query), p)[0]  # the query's gradient where it is taken
    p.data = here
    torch.testing.assert_close(a[0], want, rtol=1e-8, atol=1e-12)


def test_psi_begins_as_the_identity_and_no_inner_step_is_plain_descent():
    tuned, support, query, _ = joined()
    fresh = Regulation(dict(tuned.named_parameters()))
    g = torch.randn(5, 32)
    assert torch.equal(fresh(g), g) and torch.equal(fresh(torch.tensor(2.0)), torch.tensor(2.0))
    assert sum(p.numel() for p in fresh.parameters()) == 32 * 32 + 32
    twin = copy.deepcopy(tuned)
    Gram(inner_updates=0, meta_rate=0.1).lifecycle(tuned, [[(support, query)]] * 2)
    for _ in range(2):
        twin.loss(query).backward()
        for p in twin.parameters():
            p.data.sub_(0.1 * p.grad)
            p.grad = None
    for p, q in zip(tuned.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_an_outer_step_sums_over_its_tasks():
    tuned, support, query, psi = joined()
    method = Gram(inner_rate=0.5, meta_rate=0.2)
    tasks = [(support, query), (query, support)]
    want = [p.detach().clone() for p in [*tuned.parameters(), *psi.parameters()]]
    for s, q in tasks:
        grads = torch.autograd.grad(method.query(tuned, psi, s, q),
                                    [*tuned.parameters(), *psi.parameters()])
        for w, g in zip(want, grads, strict=True):
            w -= 0.2 * g
    out = method.lifecycle(tuned, [tasks], psi=psi)
    assert out is psi
    for p, w in zip([*tuned.parameters(), *psi.parameters()], want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in tuned.parameters())


def test_learning_lowers_the_loss_of_queries_after_a_step():
    tuned, support, query, _ = joined()
    method = Gram(inner_rate=0.5, meta_rate=20.0)
    psi = Regulation(dict(tuned.named_parameters())).double()
    before = float(method.query(tuned, psi, support, query).detach())
    psi = method.lifecycle(tuned, [[(support, query)]] * 15, psi=psi)
    assert float(method.query(tuned, psi, support, query).detach()) < before - 0.01
    assert any(bool(p.any()) for p in psi.parameters())


def test_downstream_psi_is_frozen_and_on_every_gradient():
    tuned, support, query, psi = joined(recipe="vpt(length=2, dropout=0.0) + sgd")
    psi = Gram(meta_rate=0.0).lifecycle(tuned, [[(support, query)]], psi=psi)
    held = [p.detach().clone() for p in psi.parameters()]
    assert not any(p.requires_grad for p in psi.parameters())
    (p,) = tuned.parameters()
    opt = tuned.optimizer(lr=0.5)
    with psi.regulating(opt):
        for _ in range(3):
            (g,) = torch.autograd.grad(tuned.loss(support), p)
            gate = psi.width["32"]
            want = p.detach() - 0.5 * 2 * torch.sigmoid(g @ gate.weight.t() + gate.bias) * g
            tuned.step(support)
            torch.testing.assert_close(p.detach(), want.detach(), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(psi.parameters(), held, strict=True))
    (g,) = torch.autograd.grad(tuned.loss(support), p)
    want = p.detach() - 0.5 * g                          # outside it is the recipe's own step
    tuned.step(support)
    torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-12)


def test_psi_goes_on_from_where_it_has_been_frozen():
    tuned, support, query, psi = joined()
    twin, again = copy.deepcopy((tuned, psi))
    method, rounds = Gram(inner_rate=0.5, meta_rate=0.1), [[(support, query)]] * 4
    whole = method.lifecycle(tuned, rounds, psi=psi)
    half = method.lifecycle(twin, rounds[:2], psi=again)
    assert half is again and not any(p.requires_grad for p in half.parameters())
    method.lifecycle(twin, rounds[2:], psi=half)
    for a, b in zip([*whole.parameters(), *tuned.parameters()],
                    [*half.parameters(), *twin.parameters()], strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in half.parameters())


def test_a_round_that_fails_is_named_and_psi_is_frozen():
    tuned, support, query, psi = joined()
    twin, again = copy.deepcopy((tuned, psi))
    method, calls = Gram(inner_rate=0.5, meta_rate=0.1), []

    def loss(out, batch):
        calls.append(1)
        return out.loss * (float("nan") if len(calls) > 4 else 1.0)      # two a task

    with pytest.raises(burnish.ConfigError, match="in round 3, which has moved nothing"):
        method.lifecycle(tuned, [[(support, query)]] * 5, loss, psi=psi)
    assert not any(p.requires_grad for p in psi.parameters())
    method.lifecycle(twin, [[(support, query)]] * 2, psi=again)
    for a, b in zip(psi.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_a_width_that_psi_was_not_learned_for():
    tuned, support, query, psi = joined()
    net, _ = tiny("vit")
    other = burnish.tune(net, "bitfit", head=False)
    with pytest.raises(burnish.ConfigError, match="tensor .* has rows of 64.*learned for rows of"):
        with psi.regulating(other.optimizer(lr=0.1)):
            pass
    with pytest.raises(burnish.ConfigError, match="fc1.bias has rows of 64.*for rows of 32"):
        Gram().lifecycle(other, [[(support, query)]], psi=psi)


def test_tasks_are_of_two_domains():
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 6, generator=g)
    of = torch.arange(80) % 4
    features = centres[of] + torch.randn(80, 6, generator=g)
    method = Gram(domains=4)
    found = list(itertools.islice(method.tasks(features, 5, seed=3), 12))
    for support, query in found:
        assert len(support) == len(query) == 5
        a, b = of[support].unique(), of[query].unique()
        assert len(a) == len(b) == 1 and int(a) != int(b)
    again = list(itertools.islice(method.tasks(features, 5, seed=3), 12))
    assert all(torch.equal(x, y) for s, t in zip(found, again, strict=True)
               for x, y in zip(s, t, strict=True))
    assert len({int(of[s[0]]) for s, _ in found}) > 1
    plain, nought = (list(itertools.islice(method.tasks(features, 5, **kw), 3))
                     for kw in ({}, {"seed": 0}))
    assert all(torch.equal(x, y) for s, t in zip(plain, nought, strict=True)
               for x, y in zip(s, t, strict=True))
    a, b = next(Gram(domains=2).tasks(features, 5))                      # two are enough
    assert not set(a.tolist()) & set(b.tolist())
    with pytest.raises(burnish.ConfigError, match="fall into one domain"):
        next(method.tasks(torch.zeros(1, 6), 5))


def test_the_seed_finds_the_domains_too():
    features = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2):
        of = clusters(features, 3, seed=seed)
        assert not torch.equal(of, clusters(features, 3, seed=0))
        for task in itertools.islice(Gram(domains=3).tasks(features, 60, seed=seed), 6):
            for side in task:                            # a whole domain of this seed's
                assert set(side.tolist()) == set((of == of[side[0]]).nonzero()[:, 0].tolist())


def test_its_settings():
    made = parse("gram")[0]
    assert (made.inner_rate, made.inner_updates, made.meta_rate, made.order, made.domains) == \
        (0.01, 1, 1e-3, "second", 8)


def test_what_cannot_act_is_refused():
    for settings in ({"inner_rate": -1.0}, {"meta_rate": -1.0}, {"inner_updates": -1}):
        with pytest.raises(burnish.ConfigError, match="rates and inner_updates are at least 0"):
            Gram(**settings)
    with pytest.raises(burnish.ConfigError, match="inner_updates=0 has none"):
        Gram(inner_updates=0, order="first")
    with pytest.raises(burnish.ConfigError, match="at least 2, not 1"):
        Gram(domains=1)
    tuned, support, query, psi = joined()
    with pytest.raises(burnish.ConfigError, match="a query is nan in round 1, which has moved"):
        Gram().lifecycle(tuned, [[(support, query)]], lambda out, b: out.loss * float("nan"))
    for recipe in ("lora(rank=2)", "vpt(length=2) + houlsby(bottleneck=4)", "bitfit + lean"):
        other, support, query, _ = joined(recipe=recipe)
        gate = Regulation(dict(other.named_parameters())).double()
        with pytest.raises(burnish.ConfigError, match="order='first' does without"):
            Gram().query(other, gate, support, query)
        Gram(order="first").lifecycle(other, [[(support, query)]], psi=gate)
    for recipe in ("vpt(length=2) + mezo", "full + sgd + step_in_backward"):
        net, _ = tiny("vit")
        opt = burnish.tune(net, recipe, head=False).optimizer(lr=0.1)
        with pytest.raises(burnish.ConfigError, match="gram changes gradients that wait"), \
                psi.regulating(opt):
            pass
    for p in tuned.parameters():
        p.requires_grad_(False)
    with pytest.raises(burnish.ConfigError, match="nothing trains"):
        Gram().lifecycle(tuned, [[(support, query)]])
