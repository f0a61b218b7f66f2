"""Inner rules against the equations, in fp64."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.update.rules import SGD, AdamW, Lion, Rule


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
