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


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30_000), s=st.floats(0, 0.99999), seed=st.integers(0, 9),
       move=st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 10.0]), ties=st.booleans())
def test_where_it_was_last_never_changes_what_is_found(n, s, seed, move, ties):
    g = torch.Generator().manual_seed(seed)
    values, near = torch.randn(n, generator=g).abs(), quantile.Near()
    for step in range(4):
        now = (values * 4).round() if ties else values
        got = quantile.quantile(lambda now=now: iter(now.chunk(3)), n, s,
                                lambda now=now: now[:: max(1, n // 500)], now, near)
        order = now.sort().values
        k = min(int(s * (n - 1)), n - 1)
        assert got == torch.lerp(order[k], order[min(k + 1, n - 1)], s * (n - 1) - k), step
        values = (values + move * torch.randn(n, generator=g)).abs()


def test_no_sample_is_drawn_of_values_that_hardly_move_and_one_pass_is_made():
    values, near, drawn, passes = torch.rand(200_000), quantile.Near(), [], []

    def look(values):
        return quantile.quantile(lambda: passes.append(1) or iter([values]), 200_000, 0.4,
                                 lambda: drawn.append(1) or values[::20], values, near)

    look(values)
    assert (len(drawn), len(passes)) == (1, 1)
    for k in range(1, 4):
        look(values * (1 + 2e-4 * k))
    assert (len(drawn), len(passes)) == (1, 4)
    look(values * 2)                                          # far from there: a sample again
    assert len(drawn) == 2


def test_values_that_are_no_numbers_end_the_search():
    for share in (0.1, 0.9):
        near, values = quantile.Near(), torch.rand(5_000)
        for _ in range(2):
            quantile.quantile(lambda v=values: iter([v]), 5_000, 0.5, lambda v=values: v[::5],
                              values, near)
            values[: int(share * 5_000)] = float("nan")
