"""Streamed statistics against the whole data at once, in float64."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.choose.observe import (
    AbsMax,
    Covariance,
    Gradient,
    OutputCovariance,
    Principal,
    Spectrum,
    SquaredGradient,
)
from burnish.blocks.linalg import svd


def batches(n=4, size=3, length=6, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    return [torch.randn(size, length, width, generator=g, dtype=torch.float64) * scale + 0.3
            for _ in range(n)]


def masks(xs, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(x.shape[:2], generator=g) > 0.3 for x in xs]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_covariance_is_the_mean_over_samples(scaled, masked):
    xs = batches()
    xs[0][0] = -xs[0][0].abs()      # max(X) < 0: absolute values count
    valid = masks(xs) if masked else [None] * len(xs)
    c = Covariance(8, scaled=scaled)
    want, n = torch.zeros(8, 8, dtype=torch.float64), 0
    for x, v in zip(xs, valid, strict=True):
        c.update(x, v)
        for i in range(len(x)):
            X = x[i] if v is None else x[i][v[i]]
            X = X / X.abs().max() if scaled else X
            want += X.t() @ X
            n += 1
    torch.testing.assert_close(c.value, want / n, rtol=1e-12, atol=0)
    assert c.nbytes == 4 * 64


def test_a_sample_of_padding_alone_does_not_count():
    x = batches(1)[0]
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[1] = False
    c = Covariance(8)
    c.update(x, valid)
    want = (x[0].t() @ x[0] + x[2].t() @ x[2]) / 2
    torch.testing.assert_close(c.value, want, rtol=1e-12, atol=0)


def test_absmax_is_per_feature():
    xs = batches()
    a = AbsMax(8)
    for x in xs:
        a.update(x)
    assert torch.equal(a.value, torch.cat(xs).abs().amax((0, 1)))


@pytest.mark.parametrize("length", [6, 1])
def test_principal_directions_are_those_of_all_the_data(length):
    xs = batches(n=6, length=length)
    p = Principal(8, k=8)
    for x in xs:
        p.update(x)
    X = torch.cat(xs).flatten(0, 1)
    centred = X - X.mean(0)
    _, S, V = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(p.mean, X.mean(0))
    torch.testing.assert_close(p.S, S, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((p.V * V).sum(1).abs(), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(p.explained, S**2 / (centred**2).sum())
    assert (p.V.gather(1, p.V.abs().argmax(1, keepdim=True)) > 0).all(), "signs are fixed"


def test_a_cut_pca_finds_the_leading_space():
    xs = batches(n=12, width=24)
    p = Principal(24, k=4)
    for x in xs:
        p.update(x)
    X = torch.cat(xs).flatten(0, 1)
    V = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:2]
    angle = torch.linalg.svdvals(V @ p.V.t()).min()
    assert angle > 1 - 1e-2
    torch.testing.assert_close(p.V @ p.V.t(), torch.eye(4, dtype=torch.float64))


def test_it_has_converged_when_a_batch_turns_nothing():
    x = batches(1)[0]
    p = Principal(8, k=3)
    p.update(x)
    assert not p.done
    p.update(x)
    assert p.done
    p.update(x.flip(-1))
    assert not p.done


def test_gradients_are_means_and_wait_on_the_host():
    gs = [torch.randn(5, 4) for _ in range(3)]
    mean, square = Gradient(5, 4), SquaredGradient(5, 4)
    for g in gs:
        mean.update(g)
        square.update(g)
    torch.testing.assert_close(mean.value, torch.stack(gs).mean(0))
    torch.testing.assert_close(square.value, torch.stack(gs).square().mean(0))
    assert mean.reads == "gradient" and mean.value.device.type == "cpu"


def test_equal_questions_have_equal_keys():
    assert Covariance(8).key == Covariance(8).key != Covariance(8, scaled=True).key
    assert Covariance(8).key != AbsMax(8).key
    a, b = Principal(8, 2), Principal(8, 2)
    a.update(batches(1)[0])
    assert a.key == b.key != Principal(8, 3).key


def test_half_precision_is_gathered_in_single():
    c = Covariance(8)
    c.update(torch.full((2, 300, 8), 30.0, dtype=torch.float16))      # 300 * 900 overflows fp16
    assert c.value.dtype == torch.float32 and float(c.value[0, 0]) == pytest.approx(270000)


@pytest.mark.parametrize("shape", [(6, 40), (200, 160)])
def test_svd_is_the_same_whatever_was_drawn_before(shape):
    M = torch.randn(*shape, dtype=torch.float64)
    M *= torch.logspace(0, -6, shape[1], dtype=torch.float64)
    torch.manual_seed(1)
    first = svd(M, 5)
    torch.manual_seed(2)
    again = svd(M, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    U, S, V = first
    torch.testing.assert_close(S, torch.linalg.svdvals(M)[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(U.t() @ M, S.unsqueeze(1) * V, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape, k", [((30, 20), 3), ((8, 90), 8), ((90, 80), 2)])
def test_what_a_spectrum_leaves(shape, k):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    statistic = Spectrum(k)
    assert statistic.nbytes == 4
    statistic.update(W.bfloat16().float())
    S = torch.linalg.svdvals(W.bfloat16().double())
    want = float(S[k:].square().sum() / S.square().sum())
    assert float(statistic.value) == pytest.approx(want, abs=2e-3)
    half = Spectrum(k)
    half.update(W.bfloat16())                              # read in fp32
    assert float(half.value) == float(statistic.value)
    none = Spectrum(k)
    none.update(torch.zeros(*shape))
    assert float(none.value) == 1.0


def test_output_covariance_is_the_sum_over_batches():
    g = torch.Generator().manual_seed(0)
    G = [torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(3)]
    c = OutputCovariance(6)
    assert c.nbytes == 4 * 36
    for one in G:
        c.update(one)
    torch.testing.assert_close(c.value, sum(one @ one.t() for one in G))
    half = OutputCovariance(6)
    half.update(G[0].bfloat16())
    assert half.value.dtype == torch.float32
