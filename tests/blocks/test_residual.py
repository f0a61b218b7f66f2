"""Residuals of a projected gradient against their equations, dense, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.residual import Plain, Scaled, Seen, Sign, residual
from burnish.blocks.update.subspace import Basis, SubspaceMap

F64 = torch.float64
M, N, R = 10, 16, 3
CORRECTION, BACK = 0.3, 0.25


def gradient(m=M, n=N, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seen(G, factor, image=None, height=3):
    """One step as a residual sees it. factor: P (m, r) on the left, or Q (r, n) on the right;
    image: what the rule made of R, before its correction."""
    left = factor.shape[0] == G.shape[0]
    basis = Basis(factor if left else None, None if left else factor, None, G.shape[1], F64)
    down = factor.t() @ G if left else G @ factor.t()
    axis = 0 if left else 1
    made = torch.tanh(down) if image is None else image
    return Seen(G, basis, made * CORRECTION, down.norm(dim=axis), axis, height * G.shape[1],
                CORRECTION, BACK), down, made


def factor(side, m=M, n=N):
    q = torch.linalg.qr(gradient(m if side == "left" else n, R, 7))[0]
    return q if side == "left" else q.t().contiguous()


def whole(rows, m=M):
    """All rows, in panels of unlike height."""
    return torch.cat([rows(lo, hi) for lo, hi in ((0, 1), (1, 5), (5, m))])


def outside(G, f, times=1.0):
    return G - times * (f @ (f.t() @ G) if f.shape[0] == G.shape[0] else (G @ f.t()) @ f)


def rates(made, down, left, by):
    """||N|| / (||R|| + 1e-8), N without the correction."""
    if by == "tensor":
        return made.norm() / (down.norm() + 1e-8)
    axis = 0 if left else 1
    return (made.norm(dim=axis) / (down.norm(dim=axis) + 1e-8)).unsqueeze(axis)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_plain_and_sign_are_of_what_lies_outside(side, scale):
    G, f = gradient(), factor(side)
    at, _, _ = seen(G, f)
    kw, times = ({}, 1.0) if scale is None else ({"scale": scale}, scale)
    torch.testing.assert_close(whole(Plain(**kw).rows(at, {})), times * outside(G, f), rtol=1e-12,
                               atol=1e-12)
    torch.testing.assert_close(whole(Sign(**kw).rows(at, {})), times * outside(G, f).sign(),
                               rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_sign_beside_chosen_columns_is_zero_in_them(scale):
    G = gradient()
    basis = SubspaceMap(rank=5, kind="columns").basis(G, CounterNoise(0, "w"), 0, F64)
    down = basis.down(G)
    at = Seen(G, basis, down, down.norm(dim=1), 1, 3 * N, 1.0, 1.0)
    inside = torch.zeros(N, dtype=torch.bool)
    inside[basis.columns.long()] = True
    want = torch.where(inside, torch.zeros_like(G), scale * G.sign())
    assert torch.equal(whole(Sign(scale=scale).rows(at, {})), want) and int(inside.sum()) == 5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("of", ["outside", "whole"])
@pytest.mark.parametrize("by", ["channel", "tensor"])
@pytest.mark.parametrize("size", [1.0, 1e-9])                        # 1e-8 beside ||R|| is seen
@pytest.mark.parametrize("literal", [False, True])
def test_scaled_is_the_gradient_at_the_rates_of_its_image(side, of, by, size, literal):
    G, f = gradient() * size, factor(side)
    at, down, made = seen(G, f)
    state = {}
    rows = Scaled(of=of, by=by, literal=literal).rows(at, state)
    source = G if of == "whole" else outside(G, f, BACK if literal else 1.0)
    S = rates(made, down, side == "left", by) * source
    torch.testing.assert_close(whole(rows), CORRECTION * S, rtol=1e-9, atol=0)
    assert float(state["residual_norm"]) == pytest.approx(float(S.norm()), rel=1e-9)
    assert torch.equal(G, gradient() * size), "the gradient is left as it is"


@pytest.mark.parametrize("limit", [None, 1.5, 0.0])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("size", [1.0, 1e-9])                     # 1e-8 beside ||S_last|| is seen
def test_the_limiter_bounds_growth_and_remembers_what_it_let_through(limit, first, scale, size):
    """Norms that grow, stay and fall; the scale before the limiter or behind it; 0: no limit."""
    f, state, last = factor("left"), {}, None
    kw = ({"scale_first": True} if first else {}) | ({} if limit is None else {"limit": limit}) | \
        ({} if scale is None else {"scale": scale})
    bound, times = 1.01 if limit is None else limit, scale or 1.0
    for t, factor_of_growth in enumerate([1.0, 3.0, 3.0, 0.5, 0.6]):
        G = gradient(seed=t) * size * factor_of_growth
        at, down, _ = seen(G, f, image=f.t() @ G)                         # rates of about 1
        S = rates(f.t() @ G, down, True, "channel") * outside(G, f) * (times if first else 1.0)
        if last is not None and bound:
            S = S / (max(float(S.norm()) / (last + 1e-8), bound) / bound)
        last = float(S.norm())
        got = whole(Scaled(**kw).rows(at, state))
        torch.testing.assert_close(got, CORRECTION * S * (1.0 if first else times), rtol=1e-9,
                                   atol=0)
        if bound:
            assert float(state["residual_norm"]) == pytest.approx(last, rel=1e-9)
        else:
            assert not state


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_adds_nothing_and_binds_nobody(bad):
    f, G = factor("left"), gradient()
    broken, state, fresh = G.clone(), {}, {}
    broken[0, 0] = bad
    rule = Scaled(of="whole")
    at, *_ = seen(G, f)
    whole(rule.rows(at, state))
    was = float(state["residual_norm"])
    rows = rule.rows(seen(broken, f)[0], state)
    assert float(state["residual_norm"]) == was
    clean = torch.cat([rows(lo, lo + 1) for lo in range(1, M)])
    assert not clean[torch.isfinite(clean)].any()
    rule.rows(seen(broken, f)[0], fresh)                                  # as the very first
    want = whole(rule.rows(at, {}))
    torch.testing.assert_close(whole(rule.rows(at, fresh)), want, rtol=1e-12, atol=0)
    assert float(fresh["residual_norm"]) == pytest.approx(was, rel=1e-12)


def test_words_stand_for_objects_with_their_scale_and_limit():
    assert residual("none", 0.5, 1.2) is None
    assert residual("sgd", 0.5, 1.2) == Plain(scale=0.5)
    assert residual("sign", 0.5, 1.2) == Sign(scale=0.5)
    assert residual("scaled", 0.5, 1.2) == Scaled(scale=0.5, limit=1.2)
    own = Scaled(of="whole")
    assert residual(own, 0.5, 1.2) is own
