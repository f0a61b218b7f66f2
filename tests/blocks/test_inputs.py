"""What input features do, streamed, against all of the data at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.inputs import Moments, Norms, NormsAndGradient, Ranges


def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, 5, generator=g, dtype=torch.float64) * torch.arange(1, 6) + 0.7
            for n in (3, 1, 2)]


def valid(masked):
    g = torch.Generator().manual_seed(1)
    out = [torch.rand(x.shape[:2], generator=g) > 0.4 if masked else None for x in batches()]
    if masked:
        out[0][1] = False                                    # a sample of padding alone
    return out


def rows(masked):
    return [x[i] if v is None else x[i][v[i]]
            for x, v in zip(batches(), valid(masked), strict=True) for i in range(len(x))]


@pytest.mark.parametrize("masked", [False, True])
def test_norms_and_moments(masked):
    norms, moments = Norms(5), Moments(5)
    for x, v in zip(batches(), valid(masked), strict=True):
        norms.update(x, v)
        moments.update(x, v)
    samples = [r for r in rows(masked) if len(r)]
    want = (sum(r.square().sum(0) for r in samples) / len(samples)).sqrt()
    every = torch.cat(samples)
    for got in (norms, moments):
        torch.testing.assert_close(got.norm, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.mean, every.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.variance, every.var(0, correction=0), rtol=1e-12, atol=0)
    assert norms.nbytes == 20 and moments.nbytes == 60


def test_a_batch_of_padding_alone_changes_nothing():
    x = batches()[0]
    m = Moments(5)
    m.update(x)
    before = m.mean.clone(), m.variance.clone(), m.norm.clone()
    m.update(x, torch.zeros(x.shape[:2], dtype=torch.bool))
    for a, b in zip(before, (m.mean, m.variance, m.norm), strict=True):
        assert torch.equal(a, b)


def test_a_sample_of_one_token_and_one_feature_counts():
    n = Norms(1)
    n.update(torch.full((2, 1, 1), 3.0))
    assert n.norm.item() == 3


def test_half_precision_is_added_up_in_single():
    n = Norms(5)
    n.update(torch.full((1, 5000, 5), 1.0, dtype=torch.bfloat16))
    assert n.norm.dtype == torch.float32 and torch.equal(n.square, torch.full((5,), 5000.0))


def test_nothing_read_is_no_norm():
    assert torch.equal(Norms(3).norm, torch.zeros(3))
    assert torch.equal(Moments(3).variance, torch.zeros(3))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_beside_norms(norm):
    g = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    s = NormsAndGradient(4, 5, norm, 8.0)
    for part in g:
        s.pull(part * 8)
    every = torch.stack(g)
    want = every.abs().mean(0) if norm == "l1" else every.square().mean(0).sqrt()
    torch.testing.assert_close(s.gradient, want, rtol=1e-12, atol=0)
    x = batches()[0]
    s.update(x)
    torch.testing.assert_close(s.square, x.square().sum(1).mean(0))
    assert s.nbytes == 4 * 5 + 4 * 20 and s.alone and s.reads == "both"
    assert s.key != NormsAndGradient(4, 5, norm, 8.0).key


def test_whose_turn_it_is_tells_statistics_apart():
    assert Norms(5).key == Norms(5).key != Norms(5, "blocks").key
    assert Norms(5).turns == "budget" and Moments(5, "once").turns == "once"


def test_a_loss_is_taken_as_it_is_where_nothing_is_said():
    g = torch.randn(2, 3)
    one = NormsAndGradient(2, 3, "l1")
    one.pull(g)
    torch.testing.assert_close(one.gradient, g.abs())


def test_ranges_are_of_the_tokens_that_count_and_of_zero():
    seen = Ranges()
    assert seen.read.tolist() == seen.given.tolist() == [0.0, 0.0]
    x = torch.tensor([[[1.0, 2.0], [30.0, -30.0]], [[4.0, 0.5], [3.0, 3.0]]]).double()
    valid = torch.tensor([[True, False], [True, True]])
    seen.update(x, valid)
    seen.answered(-x, valid)
    assert seen.read.tolist() == [0.0, 4.0] and seen.given.tolist() == [-4.0, 0.0]
    seen.update(torch.full((2, 3, 4, 4), -5.0), valid)       # a picture's places are no tokens
    seen.update(x[:, :0], valid[:, :0])
    assert seen.read.tolist() == [-5.0, 4.0] and seen.given.tolist() == [-4.0, 0.0]
    assert seen.nbytes == 16 and seen.reads == "ends"


def test_ranges_are_read_at_both_ends_of_a_layer():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    data = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        first = torch.cat([net[0](x) for x in data])
        last = net[1](first)
    tuned = burnish.tune(net, "int8_graph + lora(rank=1)", head=False, targets="0,1",
                         calibration=data)
    said = tuned.adapters["default"].settled["int8_graph"]
    span = lambda t: [min(0.0, float(t.min())), max(0.0, float(t.max()))]      # noqa: E731
    assert said["0.weight"] == {"reads": span(torch.cat(data)), "gives": span(first)}
    assert said["1.weight"] == {"reads": span(first), "gives": span(last)}
