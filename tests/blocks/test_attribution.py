"""The way there and back: every bit, every flag, and what a step there was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.choose.attribution import ranks_to, travelled


def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[1].bias.requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    return net, [torch.randn(5, 4, generator=g) for _ in range(2)]


@pytest.mark.parametrize("end", ["whole", "closed", "error"])
def test_it_comes_back_however_it_ends(end):
    net, batches = made()
    was = {n: p.detach().clone() for n, p in net.named_parameters()}
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    went, passes = [], []

    def loss(x):
        passes.append(x)
        if end == "error" and len(passes) > 2:
            raise ValueError("stop")
        return net(x).square().mean()

    points = travelled(net, batches, loss, 3, 0.1, 4)
    try:
        for k, ways in enumerate(points, 1):
            assert set(ways) == set(net.parameters())
            for n, p in net.named_parameters():
                torch.testing.assert_close(p, was[n] + ways[p] * k / 4)
                assert p.grad is None and not p.requires_grad
            went.append(k)
            if end == "closed" and k == 2:
                points.close()
                break
    except ValueError:
        assert end == "error"
    assert went == {"whole": [1, 2, 3, 4], "closed": [1, 2], "error": []}[end]
    assert [int(x is batches[1]) for x in passes] == [0, 1, 0]       # the batches in turn
    for n, p in net.named_parameters():
        assert torch.equal(p, was[n]) and p.requires_grad == flags[n] and p.grad is None
    net[0].weight.requires_grad_(True)
    net(batches[0]).sum().backward()
    assert torch.equal(net[0].weight, was["0.weight"])               # no step is left behind


def test_half_precision_comes_back_and_its_way_is_wide():
    net, batches = made()
    net.bfloat16()
    was = {n: p.detach().clone() for n, p in net.named_parameters()}
    for ways in travelled(net, batches, lambda x: net(x.bfloat16()).square().mean(), 2, 0.1, 1):
        assert {w.dtype for w in ways.values()} == {torch.float32}
        assert all(float(w.abs().max()) > 0.05 for w in ways.values())
    assert all(torch.equal(p, was[n]) for n, p in net.named_parameters())


def test_what_another_adapter_owns_is_not_moved():
    net, batches = made()
    net.burnish = nn.Linear(4, 4)
    (ways,) = travelled(net, batches, lambda x: net[1](net[0](x)).square().mean(), 1, 0.1, 1)
    assert set(ways) == {*net[0].parameters(), *net[1].parameters()}


def test_ranks_depend_on_proportions_alone():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = (torch.rand(6, generator=g) + 0.01).tolist()
        costs = torch.randint(10, 90, (6,), generator=g).tolist()
        want = ranks_to(900, weights, costs, [20] * 6)
        for scale in (1e-4, 1e4):
            assert ranks_to(900, [w * scale for w in weights], costs, [20] * 6) == want


def test_ranks_may_all_be_at_their_caps():
    assert ranks_to(10**9, [1.0, 2.0], [10, 10], [3, 5]) == [3, 5]
    assert ranks_to(0, [1.0, 2.0], [10, 10], [3, 5]) == [1, 1]
    assert ranks_to(10**9, [1.0, 2.0, 0.0], [10, 10, 10], [1, 2, 9]) == [1, 2, 1]


@pytest.mark.parametrize("budget, want", [(39, [1, 1]), (40, [1, 2]), (49, [1, 2]), (50, [1, 3]),
                                          (60, [1, 4]), (80, [2, 4]), (89, [2, 4]), (90, [2, 5])])
def test_the_next_to_be_rounded_up_grows_until_there_is_no_room(budget, want):
    """Levels: 1.5, 2.5, ... of the first and 0.5, 0.83, 1.17, 1.5, ... of the second."""
    assert ranks_to(budget, [1.0, 3.0], [20, 10], [9, 9]) == want


def test_of_equal_ones_the_first():
    assert ranks_to(25, [1.0, 1.0], [10, 5], [9, 9]) == [2, 1]
