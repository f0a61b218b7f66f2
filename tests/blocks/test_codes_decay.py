"""Coded moments: their mean follows fp32 where gradients have stopped."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.update.codecs import Block4, Block8, dynamic_map
from burnish.blocks.update.noise import CounterNoise


def held(codec, signed, start, decay, steps, n=4096):
    """Decode, decay, encode; one element of every block is held at 1, as by a live gradient."""
    parts = codec.empty(n, signed, torch.device("cpu"))
    x = torch.full((n,), start)
    x[:: codec.block] = 1.0
    noise = CounterNoise(0, "v")
    codec.write(parts, 0, n, x, noise, 0)
    for t in range(1, steps + 1):
        x = codec.read(parts, 0, n).mul_(decay)
        x[:: codec.block] = 1.0
        codec.write(parts, 0, n, x, noise, t)
    rest = torch.ones(n, dtype=torch.bool)
    rest[:: codec.block] = False
    return codec.read(parts, 0, n)[rest]


@pytest.mark.parametrize("codec, start, bound", [(Block8(), 0.0463, 0.03), (Block8(), 0.5, 0.03),
                                                 (Block4(), 0.5, 0.10)])
def test_a_second_moment_decays_over_three_thousand_zero_gradients(codec, start, bound):
    got = held(codec, False, start, 0.999, 3000)                      # findings 2.4
    want = start * 0.999**3000                                        # 0.0023 from 0.0463
    assert got.mean().item() == pytest.approx(want, rel=bound)
    assert (got > 0).all()


def test_it_stops_at_the_smallest_entry_and_not_at_zero():
    got = held(Block4(), False, 0.0463, 0.999, 3000, 2048)
    floor = min(v for v in dynamic_map(4, False) if v > 0)
    assert floor <= got.min() and got.mean() < 2 * floor              # 0.0023 lies below it


@pytest.mark.parametrize("codec", [Block8(), Block4()])
def test_a_first_moment_decays_too(codec):
    got = held(codec, True, 0.66, 0.9, 10, 4096)
    assert got.mean().item() == pytest.approx(0.66 * 0.9**10, rel=0.05)


@pytest.mark.parametrize("codec, signed", [(Block8(), True), (Block8(), False), (Block4(), True),
                                           (Block4(), False)])
def test_rounding_is_right_on_average_and_between_neighbours(codec, signed):
    n = codec.block * 4
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, generator=g) * 0.8 + 0.05                       # entries end at -0.89
    if signed:
        x *= torch.randint(0, 2, (n,), generator=g) * 2 - 1
    x[:: codec.block] = 1.0
    entries = torch.tensor(dynamic_map(codec.bits, signed))
    low = entries[(torch.bucketize(x, entries, right=True) - 1).clamp(min=0)]
    high = entries[torch.bucketize(x, entries).clamp(max=len(entries) - 1)]
    total, runs = torch.zeros(n), 2000
    for t in range(runs):
        parts = codec.empty(n, signed, torch.device("cpu"))
        codec.write(parts, 0, n, x, CounterNoise(0, "m"), t)
        y = codec.read(parts, 0, n)
        assert ((y == low) | (y == high)).all()
        total += y
    spread = (high - low) / 2 / runs**0.5
    assert ((total / runs - x).abs() <= 5 * spread + 1e-6).all()
