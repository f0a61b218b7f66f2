"""Which tensors take a step together, and how much of them at a time."""

from __future__ import annotations

import random

import pytest
import torch

from burnish.blocks.update.sweep import cut, state_parts, strip


def test_buffers_are_of_a_mebibyte_on_a_cpu_and_of_32_elsewhere():
    assert [4 * strip(torch.device(d)) for d in ("cpu", "cuda")] == [1 << 20, 32 << 20]


def greedy(sizes, most, block):
    """Tensor by tensor: a new run where this one would not fit, or the last ended in a block."""
    runs = []
    for i, n in enumerate(sizes):
        held = sum(sizes[j] for j in runs[-1]) if runs else 0
        if not runs or sizes[i - 1] % block or held + n > most:
            runs.append([])
        runs[-1].append(i)
    return [(r[0], r[-1] + 1) for r in runs]


@pytest.mark.parametrize("seed", range(30))
def test_runs_hold_no_more_than_fits_and_end_where_a_block_is_cut(seed):
    draw = random.Random(seed)
    block = draw.choice([1, 2, 4])
    most = draw.choice([8, 13, 40])
    sizes = [draw.randint(1, 12) for _ in range(draw.randint(1, 14))]
    got = list(cut(sizes, most, block))
    assert got == greedy(sizes, most, block)
    assert [i for a, b in got for i in range(a, b)] == list(range(len(sizes)))
    assert all(b - a == 1 or sum(sizes[a:b]) <= most for a, b in got)


def test_no_tensor_has_no_run():
    assert list(cut([], 8, 1)) == []


def test_parts_of_a_state_are_told_from_a_state_whose_name_is_longer():
    state = {"m.codes": 1, "m.absmax": 2, "m2.codes": 3, "v": 4, "step": 5}
    assert state_parts(state, "m") == {"codes": 1, "absmax": 2}
    assert state_parts(state, "v") == {"": 4}
