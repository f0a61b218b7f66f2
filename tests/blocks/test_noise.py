"""The counter stream: known answers, sharding, moments; and the log of a zeroth-order run."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save

from burnish.blocks.update.noise import (
    CounterNoise,
    ScalarLog,
    as_fp32,
    circle,
    fold,
    log_unit,
    noise,
    philox,
)
from burnish.core.errors import FormatError

ONES = 0xFFFFFFFF


@pytest.mark.parametrize("counter, key, words", [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_published_answers(counter, key, words):
    assert philox(counter, key) == words                       # Python's exact integers
    lanes = philox([torch.full((37,), c) for c in counter], key)
    for lane, word in zip(lanes, words, strict=True):          # vector and tail lanes
        assert torch.equal(lane, torch.full((37,), word))


def test_a_shard_is_a_slice_of_the_whole():
    for draw in ("normal", "bits16"):
        stream = CounterNoise(3, "h.0.weight")
        whole = getattr(stream, draw)(70_000 * 5)
        for lo, n in ((0, 1), (1, 7), (4, 4), (262_141, 9), (12_345, 300_000)):
            assert torch.equal(getattr(stream, draw)(n, lo), whole[lo : lo + n])


def test_offsets_beyond_32_bits_do_not_wrap():
    stream = CounterNoise(0, "w")
    assert not torch.equal(stream.normal(8, 2**35), stream.normal(8, 0))
    assert torch.equal(stream.normal(8, 2**35 + 4)[:4], stream.normal(8, 2**35)[4:])


def test_normals_are_standard_and_independent():
    n = 400_000
    z = CounterNoise(7, "a").normal(n).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for q in (-2.0, -1.0, 0.5, 1.5):
        share = 0.5 * (1 + math.erf(q / math.sqrt(2)))
        assert abs((z < q).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    for other in (CounterNoise(8, "a").normal(n), CounterNoise(7, "b").normal(n),
                  CounterNoise(7, "a").normal(n, turn=1), z.roll(1), z.roll(2)):
        assert abs((z * other.double()).mean()) < 5 / math.sqrt(n)


def test_bits_are_uniform():
    bits = CounterNoise(1, "w").bits16(400_000)
    assert bits.min() >= 0 and bits.max() <= 65535
    counts = torch.bincount(bits // 4096, minlength=16).double()
    assert ((counts - 25_000).abs() < 5 * math.sqrt(25_000)).all()


def test_the_polynomials_agree_with_fp64_transcendentals():
    words = torch.cat([torch.tensor([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1]),
                       torch.randint(0, 2**32, (100_000,),
                                     generator=torch.Generator().manual_seed(0))])
    exact = torch.log((words.double() + 0.5) / 2**32)
    assert ((log_unit(words).double() - exact).abs() <= 1e-6 + 1e-7 * exact.abs()).all()
    angle = ((words & 0x3FFFFFFF).double() / 2**30 - 0.5 + (words >> 30)) * math.pi / 2
    cos, sin = circle(words)
    assert (cos - angle.cos()).abs().max() < 2e-7 and (sin - angle.sin()).abs().max() < 2e-7


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise(1, "w", (3, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_folding_is_stable_between_runs():
    assert fold("query", 0, 1, 2) == 15301272792133819639
    assert fold("a", "bc") != fold("ab", "c")


def test_a_log_survives_a_file():
    log = ScalarLog(header={"queries": 1})
    for i in range(5):
        log.append(fold(i) & 0x7FFFFFFF, as_fp32(math.sin(i) * 1e-3), (1e-6 / 3, 2e-6 / 3))
    assert sum(t.nbytes for t in log.tensors().values()) == 5 * (4 + 4 + 2 * 8)
    back = ScalarLog.from_tensors(load(save(log.tensors())), log.header)
    assert back == log
    with pytest.raises(FormatError, match="lr"):
        ScalarLog.from_tensors({k: v for k, v in log.tensors().items() if k != "lr"})


def test_fp32_scalars():
    assert as_fp32(0.1) == torch.tensor(0.1).item()
    assert as_fp32(1e300) == math.inf and as_fp32(-1e300) == -math.inf
    assert math.isnan(as_fp32(math.nan))
