"""Bits that go to groups by their ranges: the least sum of variances that the room allows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from burnish.blocks.tape.allocated import Allocated, allocated
from burnish.blocks.tape.codes import Codes


def code(x, mean, group=64, generator=None):
    return Allocated.of(lambda a, b: x[a:b], x.numel(), mean, group, x, generator)


def uneven(groups, group=64, dtype=torch.float64):
    """Groups whose ranges differ as those of tokens do."""
    scale = torch.logspace(-1.5, 1, groups, dtype=torch.float64)[torch.randperm(groups)]
    return (torch.randn(groups, group, dtype=torch.float64) * scale[:, None]).view(-1).to(dtype)


@pytest.mark.parametrize("mean", [1.25, 1.5, 2.0, 2.5, 3.0, 3.5])
def test_no_other_allocation_is_better(mean):
    """All 3^7 of them: the least sum of r^2 / (2^b - 1)^2 within the room, but for one bit."""
    torch.manual_seed(0)
    for _ in range(5):
        r = torch.rand(7, dtype=torch.float64) * torch.logspace(-1, 1, 7, dtype=torch.float64)
        b = [int(v) for v in allocated(r, mean)]
        room = math.floor(7 * mean)

        def cost(bits, r=r):
            return sum(float(v) ** 2 / (2 ** k - 1) ** 2 for v, k in zip(r, bits, strict=True))

        assert set(b) <= {1, 2, 4} and room - 1 <= sum(b) <= room
        tried = [c for c in itertools.product((1, 2, 4), repeat=7) if sum(c) <= sum(b)]
        assert cost(b) <= min(map(cost, tried)) * (1 + 1e-12)


def test_groups_of_one_value_take_no_bits_from_others():
    assert allocated(torch.tensor([0., 3., 0., 3.]), 2.5).tolist() == [1, 4, 1, 4]
    assert allocated(torch.zeros(4), 1.5).sum() <= 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1000, 1024, 5])
@pytest.mark.parametrize("mean", [1.3, 2.5])
def test_a_code_is_within_a_step_of_its_group_and_takes_the_bytes_it_says(n, mean, dtype):
    torch.manual_seed(0)
    x = uneven(16, dtype=dtype)[:n]
    made, groups = code(x, mean), math.ceil(n / 64)
    wide = 8 if dtype == torch.float64 else 4
    says = (math.floor(mean * groups) + 1) * 8 + (2 * wide + 1) * groups
    assert sum(t.nbytes for t in made.tensors) == made.nbytes(n, mean, 64, dtype) == says
    got = made.values()
    assert got.shape == x.shape and got.dtype == dtype
    b = allocated(torch.stack([v.amax() - v.amin() for v in
                               x.to(torch.promote_types(dtype, torch.float32)).split(64)]), mean)
    used = set()
    for k in range(groups):
        v, back = x[64 * k:64 * k + 64].double(), got[64 * k:64 * k + 64].double()
        step = float(v.max() - v.min()) / (2 ** int(b[k]) - 1)
        eps = float(v.abs().max()) * 2 * torch.finfo(dtype).eps
        assert float((back - v).abs().max()) <= step * 1.001 + eps
        if n > 64 and dtype == torch.float64:                  # codes are whole numbers of steps
            q = (back - v.min()) / step
            assert torch.allclose(q, q.round(), atol=1e-6)
            used.add(len(q.round().unique()) > 4)
    assert not used or mean == 1.3 or used == {False, True}


def test_the_mean_of_many_codes_is_the_value():
    torch.manual_seed(0)
    x, draws = uneven(6), 1500
    g = torch.Generator().manual_seed(1)
    each = torch.stack([code(x, 2.0, generator=g).values() for _ in range(draws)])
    error = each.std(0) / draws ** 0.5
    assert float((each.mean(0) - x).abs().max()) < 0.2
    noisy = error > 1e-12
    assert float(((each.mean(0) - x)[noisy] / error[noisy]).abs().max()) < 5
    assert noisy.sum() > 300


def test_where_ranges_differ_the_variance_is_a_fraction_of_that_of_even_bits():
    """At two bits in the mean, against two bits each."""
    torch.manual_seed(0)
    x = uneven(32)
    g = torch.Generator().manual_seed(1)

    def off(kind):
        return sum(float((kind.of(lambda a, b: x[a:b], x.numel(), 2, 64, x, g).values() - x)
                         .square().sum()) for _ in range(20))

    assert off(Allocated) < 0.3 * off(Codes)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    """Long tensors are worked through in pieces, each by its own groups."""
    torch.manual_seed(0)
    x = uneven(40)[:2500]
    from burnish.blocks.tape import codes

    monkeypatch.setattr(codes, "PIECE", 256)
    made = code(x, 2.5, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(codes, "PIECE", 1 << 20)
    whole = code(x, 2.5, generator=torch.Generator().manual_seed(3))
    for a, b in zip(made.tensors[1:], whole.tensors[1:], strict=True):
        assert torch.equal(a, b)
    parts = torch.cat([made.part(a, min(a + 640, 2500)) for a in range(0, 2500, 640)])
    assert torch.equal(parts, made.values())
    top = made.tensors[2].repeat_interleave(64)[:2500]
    assert float(((made.values() - x).abs() / top).max()) <= 1.001


def test_a_machine_without_values_knows_the_sizes():
    x = torch.empty(1000, device="meta")
    assert [t.shape for t in code(x, 2.5).tensors] == [(41, 8), (16,), (16,), (16,)]


def test_values_that_are_not_finite_stay_in_their_group():
    x = torch.randn(192, dtype=torch.float64)
    x[3] = math.inf
    got = code(x, 3.0).values()
    assert not got[:64].isfinite().all() and got[64:].isfinite().all()
    assert float((got[64:] - x[64:]).abs().max()) < float(x[64:].max() - x[64:].min())
