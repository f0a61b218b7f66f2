"""State codecs: the map, the error per block, bytes, slices, and unbiased rounding."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.update.codecs import (
    Bf16,
    Block4,
    Block8,
    Plain,
    _tables,
    codec,
    dynamic_map,
    stochastic_bf16,
)
from burnish.blocks.update.noise import CounterNoise
from burnish.core.errors import RecipeError

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_full_sorted_and_holds_zero_and_one(bits, signed):
    m = dynamic_map(bits, signed)
    assert len(set(m)) == 2**bits and list(m) == sorted(m)
    assert 0.0 in m and max(m) == 1.0
    assert min(m) >= (-1 if signed else 0)
    if signed:                                     # every magnitude but 1 comes in both signs
        assert {-v for v in m if v not in (0.0, 1.0)} == {v for v in m if v not in (0.0, 1.0)}


@pytest.mark.parametrize("make", [Block8, Block4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 4096, 5000])
def test_every_value_becomes_the_nearest_entry_of_its_block(make, signed, n):
    c = make()
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g) * torch.logspace(-6, 3, n)
    x = x if signed else x.abs()
    parts = c.empty(n, signed, CPU)
    c.write(parts, 0, n, x)
    back = c.read(parts, 0, n)
    entries = torch.tensor(dynamic_map(c.bits, signed), dtype=torch.float64)
    for lo in range(0, n, c.block):
        block = x[lo : lo + c.block].double()
        absmax = block.abs().max()
        best = (block[:, None] / absmax - entries).abs().amin(1)     # brute force
        err = (back[lo : lo + c.block].double() - block).abs() / absmax
        zeroed = torch.zeros_like(best, dtype=torch.bool)
        if not signed:                             # up from zero costs at most the first entry
            zeroed = block / absmax < entries[1] / 2
            assert (back[lo : lo + c.block][block > 0] > 0).all()
            assert (err[zeroed] <= entries[1] * (1 + 1e-6)).all()
        assert (err[~zeroed] <= best[~zeroed] + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_quick_way_to_the_nearest_entry_is_the_search(bits, signed):
    tables = _tables(bits, signed, torch.zeros(1))
    mid = tables.middles[:-1]
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(50_000, generator=g), 10 ** (-9 * torch.rand(50_000, generator=g)),
                   torch.tensor([0.0, -0.0, 1.0, 1e-45, 1e-38]), tables.entries.abs(), mid.abs(),
                   torch.nextafter(mid.abs(), torch.tensor(2.0)),
                   torch.nextafter(mid.abs(), torch.tensor(0.0))])
    x = torch.cat([x, -x]) if signed else x
    assert torch.equal(tables.nearest(x), torch.bucketize(x, mid).to(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("lifted", [True, False])
def test_the_quick_way_between_two_entries_is_the_search(bits, signed, lifted):
    """Bit for bit: at entries, beside them, at zeros of both signs, at the least number."""
    e = torch.tensor(dynamic_map(bits, signed), dtype=torch.float32)
    g = torch.Generator().manual_seed(bits)
    near = torch.cat([e, (e[1:] + e[:-1]) / 2])
    x = torch.cat([torch.rand(30_000, generator=g), 10 ** (-9 * torch.rand(30_000, generator=g)),
                   torch.tensor([0.0, 1.0, 1e-45, 1e-38, 0.9999]), near.abs(),
                   torch.nextafter(near.abs(), torch.tensor(2.0)).clamp(max=1.0),
                   torch.nextafter(near.abs(), torch.tensor(0.0))])
    x = torch.cat([x, -x]) if signed else x
    noise = torch.randint(0, 1 << 16, x.shape, generator=g, dtype=torch.int32)
    noise[::3], noise[1::3] = 0, 65535
    low = (torch.bucketize(x, e, right=True) - 1).clamp(min=0)
    width = torch.cat([e.diff(), torch.tensor([math.inf])])[low]
    up = (noise + 0.5) / 65536 * width < x - e[low]
    want = low + up
    if lifted and not signed:
        want[(want == 0) & (x > 0)] = 1
    got = _tables(bits, signed, x).between(x, noise, up_from_zero=lifted and not signed)
    assert torch.equal(got.long(), want)


@pytest.mark.parametrize("make", [Block8, Block4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_that_was_not_finite_says_so_and_its_neighbours_are_as_they_were(make, signed, bad):
    c = make()
    n = 3 * c.block
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.1
    held = []
    for broken in (False, True):
        y = x.clone()
        if broken:
            y[c.block + 5] = bad
        parts = c.empty(n, signed, CPU)
        c.write(parts, 0, n, y, CounterNoise(0, "m"), 1)
        held.append(c.read(parts, 0, n).view(3, -1))
    assert not held[1][1].isfinite().any()
    assert torch.equal(held[0][[0, 2]], held[1][[0, 2]])


@pytest.mark.parametrize("name", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_several_tensors_at_once_are_each_by_itself(name, stochastic):
    c = codec(name)
    spans = [(0, 512), (1024, 2048), (256, 300 if c.block > 1 else 301)]
    g = torch.Generator().manual_seed(3)
    streams = [CounterNoise(0, k) for k in "abc"] if stochastic else None
    alone = [c.empty(2048, True, CPU) for _ in spans]
    both = [c.empty(2048, True, CPU) for _ in spans]
    xs = [torch.randn(hi - lo, generator=g) for lo, hi in spans]
    for i, (lo, hi) in enumerate(spans):
        c.write(alone[i], lo, hi, xs[i], streams and streams[i], 4)
    flat = torch.cat(xs)
    c.save(both, spans, list(flat.split([len(x) for x in xs])), flat, streams, 4)
    for a, b in zip(alone, both, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    values, _ = c.load(both, spans)
    for value, a, (lo, hi) in zip(values, alone, spans, strict=True):
        assert torch.equal(value, c.read(a, lo, hi)) and value.abs().sum() > 0


def test_the_error_bound_of_eight_bits():
    """Within the top decade entries lie 0.9/64 (signed) apart: half of that, relative to absmax."""
    x = torch.linspace(-1, 1, 256 * 20)
    c = Block8()
    parts = c.empty(len(x), True, CPU)
    c.write(parts, 0, len(x), x)
    rows = (c.read(parts, 0, len(x)) - x).view(-1, 256).abs().amax(1)
    assert (rows <= 0.9 / 64 / 2 * x.view(-1, 256).abs().amax(1) * 1.001).all()


@pytest.mark.parametrize("make, per", [(Block8, 1 + 4 / 256), (Block4, 0.5 + 4 / 128)])
def test_bytes(make, per):
    for n in (4096, 256 * 100, 10_001):
        parts = make().empty(n, True, CPU)
        stored = sum(t.nbytes for t in parts.values())
        assert stored == make().bytes(n)
        assert stored == pytest.approx(n * per, abs=5)
    assert Plain().bytes(10) == 40 and Bf16().bytes(10) == 20


@pytest.mark.parametrize("name", ["fp32", "bf16", "8bit", "4bit"])
def test_slices_are_the_whole(name):
    c = codec(name)
    n = 2 * 4096 + 77
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    stream = CounterNoise(0, "w")
    whole, sliced = c.empty(n, True, CPU), c.empty(n, True, CPU)
    c.write(whole, 0, n, x, stream, 3)
    for lo in range(0, n, 1024):
        c.write(sliced, lo, min(lo + 1024, n), x[lo : lo + 1024], stream, 3)
    for key in whole:
        assert torch.equal(whole[key], sliced[key])
    pieces = [c.read(whole, lo, min(lo + 1024, n)) for lo in range(0, n, 1024)]
    assert torch.equal(torch.cat(pieces), c.read(whole, 0, n))


def test_zero_stays_zero_and_blocks_of_zeros_are_safe():
    for make in (Block8, Block4):
        for signed in (True, False):
            c = make()
            parts = c.empty(600, signed, CPU)
            assert torch.equal(c.read(parts, 0, 600), torch.zeros(600))
            c.write(parts, 0, 600, torch.zeros(600))
            assert torch.equal(c.read(parts, 0, 600), torch.zeros(600))


def test_an_unknown_codec_is_named():
    with pytest.raises(RecipeError, match="8bit"):
        codec("8bits")


def test_stochastic_rounding_is_right_on_average():
    n = 200_000
    x = torch.full((n,), 1.0 + 2**-10)             # an eighth of bf16's spacing above 1
    y = stochastic_bf16(x, CounterNoise(0, "w").bits16(n)).double()
    assert set(y.unique().tolist()) == {1.0, 1.0 + 2**-7}
    spread = 2**-7 * math.sqrt(1 / 8 * 7 / 8)
    assert abs(y.mean() - x[0].double()) < 5 * spread / math.sqrt(n)
    y = stochastic_bf16(-x, CounterNoise(0, "w").bits16(n)).double()
    assert abs(y.mean() + x[0].double()) < 5 * spread / math.sqrt(n)


def test_stochastic_rounding_keeps_what_bf16_can_hold_and_guards_the_ends():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = torch.full((1000,), 65535, dtype=torch.int32)
    assert torch.equal(stochastic_bf16(exact.float(), bits), exact)
    ends = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max,
                         torch.finfo(torch.float32).min])
    got = stochastic_bf16(ends, bits[:5])
    assert got[0] == math.inf and got[1] == -math.inf and got[2].isnan()
    assert torch.equal(got[3:].float(), torch.tensor([1.0, -1.0]) * torch.finfo(torch.bfloat16).max)
    loud = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert stochastic_bf16(loud, bits[:3]).isnan().all()   # a carry ends no NaN, a cut makes no inf


@pytest.mark.parametrize("bits", [0, 1, 32768, 65535])
def test_stochastic_rounding_is_an_addition_below_and_a_cut(bits):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g) * 10 ** (80 * torch.rand(20_000, generator=g) - 44)
    raw = x.view(torch.int32).long() & 0xFFFFFFFF
    want = ((raw + bits) & 0xFFFF0000).to(torch.int64)
    want = torch.where(want > 0x7FFFFFFF, want - (1 << 32), want).to(torch.int32)
    want = want.view(torch.float32)
    want = torch.where(want.isfinite() & (raw & 0x7F800000 < 0x7F800000), want, math.nan)
    got = stochastic_bf16(x, torch.full(x.shape, bits, dtype=torch.int32)).float()
    fine = want.isfinite()
    assert torch.equal(got[fine], want[fine]) and fine.float().mean() > 0.9


def test_a_bf16_second_moment_moves_only_with_stochastic_rounding():
    def decay(c):
        parts = c.empty(2000, False, CPU)
        c.write(parts, 0, 2000, torch.ones(2000))
        for t in range(200):
            c.write(parts, 0, 2000, c.read(parts, 0, 2000) * 0.999, CounterNoise(0, "v"), t)
        return c.read(parts, 0, 2000).double().mean()

    assert decay(Bf16(stochastic=False)) == 1.0
    assert decay(Bf16()) == pytest.approx(0.999**200, rel=0.01)
