"""Matrices that train in full and answer in a few bits: levels, values, gradients, packing."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight.latent import Latent, Stored, finished, levels, quantised, reference


def test_the_levels_of_the_paper():
    """b = 1: +-0.6745; b = 2: +-0.3778, +-1.2657 with borders 0, +-0.8217."""
    v, t = levels(1)
    assert v == pytest.approx((-0.6745, 0.6745), abs=5e-5) and t == pytest.approx((0,), abs=1e-12)
    v, t = levels(2)
    assert v == pytest.approx((-1.2657, -0.3778, 0.3778, 1.2657), abs=5e-5)
    assert t == pytest.approx((-0.8217, 0, 0.8217), abs=5e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_each_level_is_the_median_of_its_interval_and_no_other_code_errs_less(bits):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(400_000, generator=g, dtype=torch.float64)
    v, t = (torch.tensor(x, dtype=torch.float64) for x in levels(bits))
    at = torch.bucketize(w, t)
    for k in range(2 ** bits):
        assert float(w[at == k].median()) == pytest.approx(float(v[k]), abs=0.02)
    torch.testing.assert_close(t, (v[1:] + v[:-1]) / 2)
    least = (w - v[at]).abs().mean()
    for other in (0.9, 1.1):
        assert (w - other * v[torch.bucketize(w, other * t)]).abs().mean() > least


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_and_the_gradient_are_those_of_the_equation(bits):
    """sigma (w + sg[Q(w) - w]) + m, neither m nor sigma detached, Q the sum of signs."""
    torch.manual_seed(0)
    W = (torch.randn(7, 9, dtype=torch.float64) * 0.3 + 0.1).requires_grad_()
    G = torch.randn(7, 9, dtype=torch.float64)
    m, sigma = W.mean(), W.std(unbiased=True)
    w = (W - m) / (sigma + 1e-5)
    v, t = levels(bits)
    q = sum(torch.sign(w.detach() - b) * (v[i + 1] - v[i]) / 2 for i, b in enumerate(t))
    want = sigma * (w + (q - w).detach()) + m
    for got in (quantised(W, bits), reference(W, bits)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got, W, G)[0],
                                   torch.autograd.grad(want, W, G, retain_graph=True)[0],
                                   rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(32, 768), (3, 5), (1, 7)])
def test_what_is_packed_comes_back_to_the_last_bit(bits, shape):
    latent, stored = Latent(*shape, bits), Stored(*shape, bits)
    file = latent.finished()
    stored.load_state_dict(file)
    made = latent.matrix().detach()
    assert torch.equal(stored.matrix(), made) and made.unique().numel() <= 2 ** bits
    n = shape[0] * shape[1]
    assert sum(t.nbytes for t in file.values()) == -(-n * bits // 8) + 8


def test_a_matrix_has_exactly_two_values_at_one_bit():
    W = Latent(32, 768, 1).weight.detach()
    assert quantised(W, 1).unique().numel() == 2
    at_the_mean = torch.tensor([[-1.0, 0.0, 1.0]])         # sign(0) would be a third
    values = quantised(at_the_mean, 1)
    assert values.unique().numel() == 2 and values[0, 1] == values[0, 2]
    assert finished(at_the_mean, 1)["codes"].tolist() == [0b110]


def test_starts():
    torch.manual_seed(0)
    down, up = Latent(64, 400, 1).weight.detach(), Latent(400, 64, 1, std=1e-3).weight.detach()
    assert float(down.abs().max()) <= 400 ** -0.5 < 1.01 * float(down.abs().max())
    assert float(up.abs().max()) <= 2e-3 and float(up.std()) == pytest.approx(8.8e-4, rel=0.03)


def test_backward_keeps_the_matrix_that_trains_alone():
    W = torch.randn(8, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantised(W, 1)
    assert [t.data_ptr() for t in kept] == [W.data_ptr()]
    got, = torch.func.grad(lambda w: quantised(w, 1).square().sum())(W.detach()).unsqueeze(0)
    torch.testing.assert_close(got, torch.autograd.grad(quantised(W, 1).square().sum(), W)[0])
