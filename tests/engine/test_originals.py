"""The base's own values, where they wait."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from burnish.engine import originals
from burnish.engine.originals import Originals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["memory", "disk"])
def test_values_come_back_to_the_bit(dtype, limit, monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", limit)
    kept = Originals()
    value = torch.randn(5, 7).to(dtype)
    kept.put("a.b", "weight", value)
    want = value.clone()
    value.zero_()
    got = kept.get("a.b", "weight")
    assert torch.equal(got, want) and got.dtype == dtype
    assert kept.home("a.b", "weight") == torch.device("cpu")


def test_the_first_value_stays():
    kept = Originals()
    kept.put("a", "weight", torch.ones(2))
    kept.put("a", "weight", torch.zeros(2))
    assert kept.get("a", "weight").tolist() == [1, 1]
    assert ("a", "weight") in kept and list(kept) == [("a", "weight")]


def test_views_and_transposes(monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", 0)
    kept = Originals()
    base = torch.arange(12.0).view(3, 4)
    kept.put("a", "w", base.t())
    kept.put("b", "w", base[1:])
    assert torch.equal(kept.get("a", "w"), base.t())
    assert torch.equal(kept.get("b", "w"), base[1:])


def test_large_ones_leave_memory_and_their_files_go_with_them(monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", 16)
    kept = Originals()
    for i in range(3):
        kept.put(f"m{i}", "weight", torch.full((8,), float(i)))
    files = [v for v in kept.kept.values() if isinstance(v, Path)]
    assert len(files) == 3
    kept.forget("m0", "weight")
    kept.put("m3", "weight", torch.full((8,), 3.0))
    assert not files[0].exists()
    assert [float(kept.get(f"m{i}", "weight")[0]) for i in (1, 2, 3)] == [1, 2, 3]
    folder = files[1].parent
    kept.clear()
    assert not folder.exists() and not list(kept)


def test_an_abandoned_store_leaves_no_files(monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", 0)
    kept = Originals()
    kept.put("a", "w", torch.ones(4))
    folder = kept.kept["a", "w"].parent
    with pytest.warns(ResourceWarning):
        del kept
        gc.collect()
    assert not folder.exists()


def test_fake_values_cost_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        kept = Originals()
        kept.put("a", "w", torch.empty(1 << 30, 8))
        assert kept.get("a", "w").shape == (1 << 30, 8)
