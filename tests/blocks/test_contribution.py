"""What input channels of a weight would gain, streamed, against all at once."""

from __future__ import annotations

import torch

from burnish.blocks.choose.contribution import Contribution, channels, per_channel, ranked
from burnish.core.site import Place

LINEAR = Place("a", "weight", "linear", 4, 6)
CONV = Place("a", "weight", "conv", 8, 3 * 4, kernel=4, axes=(2, 2), groups=2)


def by_hand(M):
    """CONV's: channel c is of group c // 3; its squares over the group's outputs and the kernel."""
    M = M.view(8, 3, 4)
    return torch.stack([M[4 * (c // 3) : 4 * (c // 3) + 4, c % 3].square().sum() for c in range(6)])


def test_channels_of_a_matrix():
    M = torch.randn(4, 6, dtype=torch.float64)
    assert channels(LINEAR) == channels(CONV) == 6
    torch.testing.assert_close(per_channel(LINEAR, M), M.square().sum(0))
    K = torch.randn(8, 12, dtype=torch.float64)
    torch.testing.assert_close(per_channel(CONV, K), by_hand(K))
    assert per_channel(CONV, K.bfloat16()).dtype == torch.float32


def test_the_heaviest_come_first_and_of_equal_ones_the_first():
    W = torch.zeros(4, 6)
    W[0] = torch.tensor([1.0, -3.0, 0.0, 3.0, 2.0, 0.0])
    assert ranked(LINEAR, W).tolist() == [1, 3, 4, 0, 2, 5]


def test_gains_are_means_over_batches_and_positions_of_one_row():
    s = Contribution(CONV)
    assert (s.reads, s.turns, s.condenses, s.nbytes) == ("both", "once", True, 72)
    assert s.gain.tolist() == [0.0] * 6 and s.order.tolist() == list(range(6))
    W, g = torch.randn(8, 12), [torch.randn(8, 12) for _ in range(3)]
    s.weigh(W)
    s.pull(g[0])
    torch.testing.assert_close(s.gain, by_hand(g[0]))
    for part in g[1:]:
        s.pull(part)
    assert s.order.tolist() == by_hand(W).argsort(descending=True).tolist()
    torch.testing.assert_close(s.gain, sum(map(by_hand, g)) / 3)
    s.update(torch.zeros(5, 6, 7, 8))
    assert s.positions == 56
    s.update(torch.zeros(5, 6, 2, 2))
    assert s.positions == 56
    one = Contribution(LINEAR, given=True)
    one.update(torch.zeros(5, 9, 6))
    assert one.positions == 9 and one.reads == "input"
    assert s.cost(1) == 56 + 4 * 4 * 4 and one.cost(4) == 4 * 9 + 4 * 4
    assert one.key != Contribution(LINEAR, given=True).key
