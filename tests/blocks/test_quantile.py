from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.choose import quantile


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40_000), s=st.floats(0, 0.99999), seed=st.integers(0, 9),
       ties=st.booleans(), panels=st.integers(1, 4))
def test_streaming_quantile_is_exact(n, s, seed, ties, panels):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=g).abs()
    if ties:
        values = (values * 4).round()
    chunks = [c for c in values.chunk(panels) if c.numel()]
    got = quantile.quantile(lambda: iter(chunks), n, s,
                            lambda: values[:: max(1, n // 1000)], values)
    k = min(int(s * (n - 1)), n - 1)
    order = values.sort().values
    want = torch.lerp(order[k], order[min(k + 1, n - 1)], s * (n - 1) - k)
    assert got == want


def test_an_unfair_sample_only_costs_time():
    values = torch.randn(50_000).abs()
    low, high = quantile.order_statistics(lambda: iter([values]), 50_000, 40_000,
                                          lambda: values.sort().values[:500], values)
    order = values.sort().values
    assert (low, high) == (order[40_000], order[40_001])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 5_000), seed=st.integers(0, 9), where=st.floats(0, 1), ties=st.booleans())
def test_radix_histogram_picks_the_same_entries(n, seed, where, ties):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).abs()
    if ties:
        values = (values * 3).round()
    k = min(int(where * n), n - 1)
    order = values.sort().values
    low, high = quantile.radix(lambda: iter(values.chunk(3)), n, k)
    assert (low, high) == (order[k], order[min(k + 1, n - 1)])


def test_a_device_makes_the_values_twice_and_asks_for_none_of_them():        # findings 3.10
    """A fake tensor has no value: whatever asks for one raises."""
    passes = []

    def stream():
        passes.append(1)
        return iter([torch.empty(50, 40, device="cuda"), torch.empty(50, 40, device="cuda")])

    with FakeTensorMode():
        low, high = quantile.order_statistics(stream, 4000, 1234, None,
                                              torch.empty(64, device="cuda"))
        assert low.shape == high.shape == () and low.device.type == "cuda"
    assert len(passes) == 2
