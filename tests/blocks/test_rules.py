"""Inner rules against the equations, in fp64."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.update.rules import SGD, AdamW, Lion, Rule, Whole, accumulator, move


def gradients(n=40, steps=7):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(steps)]


def follow(rule, grads):
    state, out = rule.init(grads[0]), []
    for t, g in enumerate(grads, 1):
        out.append(rule.direction(g.clone(), state, t, rule.hyper()).clone())
    return out


@pytest.mark.parametrize("rule", [AdamW(), Lion(), SGD(), SGD(momentum=0.9)])
def test_a_rule_is_a_rule_and_starts_at_zero(rule):
    assert isinstance(rule, Rule)
    state = rule.init(torch.ones(3, 4, dtype=torch.bfloat16))
    assert set(state) == set(rule.states)
    for s in state.values():
        assert s.dtype == torch.float32 and s.shape == (3, 4) and not s.any()


def test_adamw():
    m = v = 0.0
    for t, (g, u) in enumerate(zip(gradients(), follow(AdamW(), gradients()), strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        want = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(u, want, rtol=1e-10, atol=1e-12)


def test_adamw_with_eps_before_the_correction():
    m = v = 0.0
    got = follow(AdamW(eps=1e-2, eps_first=True), gradients())
    for t, (g, u) in enumerate(zip(gradients(), got, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        want = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-2)
        torch.testing.assert_close(u, want, rtol=1e-10, atol=1e-12)
    plain = follow(AdamW(eps=1e-2), gradients())
    assert (plain[0] - got[0]).abs().max() > 0.01          # the two forms do differ


def test_lion_takes_the_sign_before_the_momentum_moves():
    m = torch.zeros(40, dtype=torch.float64)
    for g, u in zip(gradients(), follow(Lion(), gradients()), strict=True):
        assert torch.equal(u, torch.sign(0.9 * m + 0.1 * g))
        m = 0.99 * m + 0.01 * g


def test_lion_of_nothing_is_nothing():
    assert not follow(Lion(), [torch.zeros(4)])[0].any()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(nesterov):
    b = 0.0
    for g, u in zip(gradients(), follow(SGD(momentum=0.9, nesterov=nesterov), gradients()),
                    strict=True):
        b = 0.9 * b + g
        torch.testing.assert_close(u, g + 0.9 * b if nesterov else b, rtol=1e-12, atol=0)


def test_sgd_without_momentum_is_the_gradient_and_keeps_nothing():
    assert not SGD().states and all(
        torch.equal(u, g) for u, g in zip(follow(SGD(), gradients()), gradients(), strict=True))


def together(rule, steps, lr=0.25, decay=0.0):
    """Several tensors moved at once, step by step: (t, gradients, weights before, weights after).
    The gradients are left as they were."""
    xs = [gradients(n, steps)[0].clone() for n in (5, 8)]
    states = {s: [torch.zeros(n, dtype=torch.float64) for n in (5, 8)] for s in rule.states}
    for t in range(1, steps + 1):
        gs = [gradients(n, steps)[t - 1] for n in (5, 8)]
        given, before = [g.clone() for g in gs], [x.clone() for x in xs]
        move(rule, xs, given, states, t, rule.hyper(), lr, decay)
        assert all(torch.equal(a, b) for a, b in zip(given, gs, strict=True))
        yield t, gs, before, [x.clone() for x in xs]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_of_several_tensors_is_the_equation_of_each(first, fused, monkeypatch):
    if not fused:                                      # a device without torch's fused kernels
        monkeypatch.setattr("burnish.blocks.update.rules.FUSED", frozenset())
    b1, b2, eps = 0.8, 0.95, 1e-2
    m, v = [0.0, 0.0], [0.0, 0.0]
    rule = AdamW(betas=(b1, b2), eps=eps, eps_first=first)
    for t, gs, before, after in together(rule, 4, 0.25, 0.1):
        for k, g in enumerate(gs):
            m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g**2
            c1, c2 = 1 - b1**t, (1 - b2**t) ** 0.5
            u = c2 / c1 * m[k] / (v[k].sqrt() + eps) if first else \
                (m[k] / c1) / (v[k].sqrt() / c2 + eps)
            want = before[k] * (1 - 0.25 * 0.1) - 0.25 * u
            torch.testing.assert_close(after[k], want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fused", [True, False])
def test_lion_of_several_tensors_is_the_sign_of_each(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("burnish.blocks.update.rules.FUSED", frozenset())
    m = [torch.zeros(5, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)]
    for _, gs, before, after in together(Lion(betas=(0.8, 0.95)), 5, 0.25, 0.1):
        for k, g in enumerate(gs):
            want = before[k] * (1 - 0.25 * 0.1) - 0.25 * torch.sign(0.8 * m[k] + 0.2 * g)
            torch.testing.assert_close(after[k], want, rtol=1e-14, atol=1e-15)
            m[k] = 0.95 * m[k] + 0.05 * g


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_of_several_tensors_adds_the_decay_to_each_gradient(fused, momentum, nesterov,
                                                                monkeypatch):
    if not fused:
        monkeypatch.setattr("burnish.blocks.update.rules.FUSED", frozenset())
    b = [0.0, 0.0]
    for _, gs, before, after in together(SGD(momentum=momentum, nesterov=nesterov), 4, 0.25, 0.1):
        for k, g in enumerate(gs):
            g = g + 0.1 * before[k]
            b[k] = momentum * b[k] + g
            want = before[k] - 0.25 * (g + momentum * b[k] if nesterov else b[k])
            torch.testing.assert_close(after[k], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", [AdamW(), AdamW(eps_first=True), SGD(), SGD(momentum=0.9)])
def test_a_direction_is_written_over_the_gradient_it_was_given(rule):
    """A step takes no memory beside its scratch."""
    g = gradients()[0]
    state = rule.init(g)
    assert rule.direction(g, state, 1, rule.hyper()).data_ptr() == g.data_ptr()


def test_what_can_be_taken_out_of_a_direction_is_its_correction():
    for t in (1, 2, 9):
        want = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        rule = AdamW(eps_first=True)
        assert rule.correction(t, rule.hyper()) == pytest.approx(want, rel=1e-12)
        assert AdamW().correction(t, AdamW().hyper()) == 1.0


def test_what_nobody_set_is_the_papers_and_what_may_be_negative_is_said():
    assert AdamW().hyper() == {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01,
                               "eps_first": False}
    assert Lion().hyper() == {"betas": (0.9, 0.99), "weight_decay": 0.0}
    assert SGD().hyper() == {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    assert AdamW().states == {"exp_avg": True, "exp_avg_sq": False}
    assert Lion().states == {"exp_avg": True}
    assert SGD(momentum=0.5).states == {"momentum_buffer": True}
    assert AdamW.decoupled and Lion.decoupled and Whole.decoupled and not SGD.decoupled


def test_only_fp64_is_stepped_in_fp64():
    assert accumulator(torch.float64) == torch.float64
    assert {accumulator(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == \
        {torch.float32}
    state = AdamW().init(torch.ones(3, dtype=torch.float64))
    assert all(s.dtype == torch.float64 for s in state.values())


def test_a_rule_of_whole_tensors_names_the_states_of_vectors_and_matrices():
    class Both(Whole):
        def shapes(self, shape):
            return {"v": shape} if len(shape) == 1 else {"row": shape[:1], "m": shape}

    assert Both().states == {"v": True, "row": True, "m": True}
    with pytest.raises(TypeError, match="whole steps whole tensors"):
        Both().direction(torch.ones(3), {}, 1, {})
