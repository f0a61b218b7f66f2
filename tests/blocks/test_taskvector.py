"""Task vectors against the flat, dense, obvious computation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.weight.taskvector import TaskVector, combine, threshold
from burnish.core.errors import ConfigError
from burnish.formats.safe import Tensors, save_file
from burnish.methods.lifecycle.task_arithmetic import task_arithmetic


def checkpoint(seed, dtype=torch.float32, near=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)}
    if near is None:
        return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    return {n: t + 0.01 * torch.randn(t.shape, generator=g).to(dtype) for n, t in near.items()}


def flat(tv):
    return torch.cat(list(tv.pieces()))


# -- order statistics -----------------------------------------------------------------------
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_the_threshold_is_exactly_the_kth_largest_magnitude(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    got = threshold(lambda: [p for p in (x[:cut], x[cut:]) if len(p)], len(x), k / len(x))
    assert got == x.abs().sort(descending=True).values[k - 1].item()


def test_threshold_keeps_exactly_the_fraction():
    tv = TaskVector(checkpoint(0), checkpoint(1))
    for keep in (0.0, 0.01, 0.2, 0.5, 0.999, 1.0):
        kept = int((flat(tv).abs() >= tv.threshold(keep)).sum())
        assert kept == math.ceil(keep * tv.numel)
    ties = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert threshold(lambda: [ties], 5, 0.4) == 1.0          # >= keeps all that tie
    for wrong in (20, 1.5, -0.1):
        with pytest.raises(ConfigError, match="fraction"):
            tv.threshold(wrong)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_threshold_of_inf_or_nan(bad):
    with pytest.raises(ConfigError, match="inf or nan"):
        threshold(lambda: [torch.tensor([1.0, bad])], 2, 0.5)


def test_moments_and_pieces_equal_the_flat_vector():
    base, tuned = checkpoint(0), checkpoint(1)
    tv = TaskVector(base, tuned)
    whole = torch.cat([(tuned[n].double() - base[n].double()).flatten() for n in base])
    assert tv.numel == whole.numel() and torch.equal(flat(tv), whole.float())
    assert torch.equal(torch.cat(list(tv.pieces(piece=5))), flat(tv))
    assert tv.std() == pytest.approx(whole.float().double().std(correction=0).item(), rel=1e-12)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation allocated."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, out.numel())
        return out


def test_no_more_than_a_piece_is_allocated():
    piece, whole = 1 << 17, 1 << 18                          # larger than a histogram, 2^16
    base = {f"w{i}": torch.zeros(whole) for i in range(4)}
    tuned = {n: torch.rand_like(t) for n, t in base.items()}
    tv = TaskVector(base, tuned)
    with Largest() as seen:
        threshold(lambda: tv.pieces(piece), tv.numel, 0.3)
        for _ in combine(base, [tv, tv], lambda taus, *_: taus.sum(0), piece=piece // 2):
            pass
    assert seen.entries == whole                             # one output tensor, nothing larger
    with Largest() as seen:
        threshold(lambda: tv.pieces(piece), tv.numel, 0.3)
    assert seen.entries == piece


# -- what is merged -------------------------------------------------------------------------
def test_what_cannot_be_averaged_is_left_to_the_base():
    base = {**checkpoint(0), "head.weight": torch.zeros(3, 4), "ids": torch.arange(3),
            "bn.running_mean": torch.zeros(2), "only": torch.ones(1)}
    tuned = {**checkpoint(1), "head.weight": torch.ones(5, 4), "ids": torch.arange(3) + 1,
             "bn.running_mean": torch.ones(2), "new": torch.ones(1)}
    tv = TaskVector(base, tuned)
    assert set(tv.skipped) == {"head.weight", "ids", "bn.running_mean", "only", "new"}
    assert tv.skipped["head.weight"] == "[5, 4] beside [3, 4]"
    merged = dict(task_arithmetic(base, [tuned], 1.0))
    assert merged.keys() == base.keys()
    for n in ("head.weight", "ids", "bn.running_mean", "only"):
        assert torch.equal(merged[n], base[n])


def test_tied_tensors_are_subtracted_once():
    base, tuned = checkpoint(0), checkpoint(1)
    base["head.weight"], tuned["head.weight"] = base["embed.weight"], tuned["embed.weight"]
    tv = TaskVector(base, tuned)
    assert tv.tied == {"head.weight": "embed.weight"}
    assert tv.numel == sum(base[n].numel() for n in checkpoint(0))
    merged = dict(task_arithmetic(base, [tuned], 0.5))
    assert merged["head.weight"] is merged["embed.weight"]
    untied = {**tuned, "head.weight": tuned["head.weight"] + 1}
    assert TaskVector(base, untied).tied == {}


def test_the_rule_sees_every_entry_once_and_in_place():
    base, tuned = checkpoint(0), checkpoint(1)
    seen = []

    def rule(taus, name, start):
        seen.append((name, start, taus.shape))
        return torch.zeros(taus.shape[1], dtype=taus.dtype)

    out = dict(combine(base, [TaskVector(base, tuned)] * 2, rule, piece=16))
    assert all(torch.equal(out[n], base[n]) for n in base)
    assert [s for n, s, _ in seen if n == "embed.weight"] == [0, 16, 32, 48, 64]
    assert seen[0][2] == (2, 16)


def test_equal_small_tensors_read_from_a_file_are_not_taken_for_tied(tmp_path):
    base = {f"b{i}": torch.full((4,), float(i)) for i in range(6)}
    save_file(base, tmp_path / "b.safetensors")
    save_file({n: torch.zeros(4) for n in base}, tmp_path / "t.safetensors")
    tv = TaskVector(Tensors(tmp_path / "b.safetensors"), Tensors(tmp_path / "t.safetensors"))
    assert tv.tied == {} and len(tv.names) == 6
