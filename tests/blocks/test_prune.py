"""Which entries stay, against a plain loop over entries."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.choose import prune
from burnish.blocks.choose.prune import PANEL, grown_and_pruned, kept, panels, pattern
from burnish.core.errors import RecipeError


def lowest(values, k):
    """Positions of the k lowest, of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:k])


@pytest.fixture(params=[1 << 22, 20])
def panel(request, monkeypatch):
    monkeypatch.setattr(prune, "PANEL", request.param)


@pytest.mark.parametrize("ratio, k", [(0.5, 6), (0.3, 3), (0.25, 3), (0.01, 0), (0.99, 11)])
def test_rows_lose_their_lowest(ratio, k, panel):
    score = torch.rand(3, 5, 12, dtype=torch.float64)
    got = kept(score, "row", ratio)
    for row, mask in zip(score.flatten(0, 1), got.flatten(0, 1), strict=True):
        assert set((~mask).nonzero().squeeze(1).tolist()) == lowest(row.tolist(), k)


def test_a_share_is_rounded_down_and_a_product_of_floats_is_not_taken_at_its_word():
    assert int(0.29 * 100) == 28
    assert int((~kept(torch.rand(1, 100), "row", 0.29)).sum()) == 29


def test_the_matrix_loses_its_lowest_each_expert_by_itself():
    score = torch.rand(2, 5, 6)
    for one, mask in zip(score, kept(score, "matrix", 0.4), strict=True):
        assert set((~mask).flatten().nonzero().squeeze(1).tolist()) == \
            lowest(one.flatten().tolist(), 12)


def test_where_none_goes_it_is_a_mask_all_the_same():
    assert torch.equal(kept(torch.rand(2, 3), "matrix", 0.1), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 3), (4, 6)])
def test_of_every_run_of_m_inputs_n_stay(n, m, panel):
    score = torch.rand(7, 12)
    got = kept(score, f"{n}:{m}", 0.5)
    for row, mask in zip(score, got, strict=True):
        for i in range(0, 12, m):
            gone = (~mask[i : i + m]).nonzero().squeeze(1).tolist()
            assert set(gone) == lowest(row[i : i + m].tolist(), m - n)


@pytest.mark.parametrize("mask, want", [("row", [0, 1, 2, 4]), ("2:4", [0, 1, 4, 5]),
                                        ("matrix", [0, 1, 2, 4])])
def test_of_equal_scores_the_first_go(mask, want):
    score = torch.tensor([[1.0, 1, 1, 2, 1, 1, 1, 3]])
    assert (~kept(score, mask, 0.5)).nonzero()[:, 1].tolist() == want
    lower = torch.tensor([[1.0, 0, 1, 1, 1, 1, 2, 3]])       # one lies below them
    assert (~kept(lower, "row", 0.5)).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_patterns_are_read_or_refused():
    assert pattern("row") is None and pattern("matrix") is None
    assert pattern("2:4") == (2, 4) and pattern("1:2") == (1, 2) and pattern("4:8") == (4, 8)
    for bad in ("4:4", "0:4", "5:4", "rows", "2-4", "2:4:8", "", ":4", "12345:4"):
        with pytest.raises(RecipeError, match="expected 'row', 'matrix', or such as '2:4'"):
            pattern(bad)


# -- exchanges ------------------------------------------------------------------------------------
def exchanged(V, score, keep, variance, tolerance, cycles, m=0):
    """One row after another, one exchange after another, in plain Python."""
    V, score, keep = V.tolist(), score.tolist(), keep.tolist()
    errors = []
    for v, s, on in zip(V, score, keep, strict=True):
        e = sum(x for x, k in zip(v, on, strict=True) if not k)
        path = [e]
        for _ in range(cycles):
            if abs(e) <= tolerance:
                break
            sign = 1 if e > 0 else -1
            gone = [j for j in range(len(v)) if not on[j]]
            g = max(gone, key=lambda j: sign * v[j] / variance[j], default=None)
            if g is None or sign * v[g] <= 0:
                break
            if m:
                may = [j for j in range(len(v)) if on[j] and j // m == g // m]
            else:
                may = [j for j in range(len(v)) if on[j] and sign * v[j] < 0]
            if not may:
                break
            p = min(may, key=lambda j: s[j])
            new = e + v[p] - v[g]
            if new * sign < 0:
                break
            on[g], on[p], e = True, False, new
            path.append(e)
        errors.append(path)
    return torch.tensor(keep), errors


@pytest.mark.parametrize("m", [0, 4])
@pytest.mark.parametrize("tolerance, cycles", [(0.1, 50), (0.0, 50), (0.1, 1), (3.0, 50)])
def test_entries_change_places_as_in_a_plain_loop(m, tolerance, cycles, panel):
    torch.manual_seed(m + cycles)
    V = torch.randn(40, 16, dtype=torch.float64)
    score = torch.rand(40, 16, dtype=torch.float64)
    variance = torch.rand(16, dtype=torch.float64) + 0.1
    keep = kept(score, "2:4" if m else "row", 0.5)
    got = grown_and_pruned(V, score, keep, variance, tolerance, cycles, m)
    want, paths = exchanged(V, score, keep, variance.tolist(), tolerance, cycles, m)
    assert torch.equal(got, want)
    assert torch.equal(got.sum(1), keep.sum(1)), "as many of each row"
    assert torch.equal(keep, kept(score, "2:4" if m else "row", 0.5)), "what was given stays"
    moved = [len(p) > 1 for p in paths]
    assert any(moved)
    if m:
        assert (got.unflatten(1, (-1, 4)).sum(2) == 2).all()
    else:
        for path in paths:
            assert all(abs(b) <= abs(a) for a, b in zip(path, path[1:], strict=False))
    start = V.masked_fill(keep, 0).sum(1).abs()
    still = start <= tolerance
    assert torch.equal(got[still], keep[still])


def test_an_input_that_never_moves_comes_back_first_and_is_no_nan():
    V = torch.tensor([[2.0, 3.0, -1.0, 0.0]])
    keep = torch.tensor([[False, False, True, False]])
    got = grown_and_pruned(V, torch.ones(1, 4), keep, torch.tensor([0.0, 1.0, 1.0, 0.0]), 0.1, 1)
    assert got.tolist() == [[True, False, False, False]]
    V = torch.tensor([[2.0, 0.0, 3.0, -1.0]])
    keep = torch.tensor([[False, False, False, True]])
    got = grown_and_pruned(V, torch.ones(1, 4), keep, torch.tensor([1e-3, 0.0, 1e-2, 1.0]), 0.1, 1)
    assert got.tolist() == [[True, False, False, False]]


def test_an_exchange_that_ends_at_zero_is_made():
    V = torch.tensor([[2.0, 1.0, -1.0]])
    keep = torch.tensor([[False, False, True]])              # e = 3, then 3 - 2 - 1 = 0
    got = grown_and_pruned(V, torch.ones(1, 3), keep, torch.ones(3), 0.1, 5)
    assert got.tolist() == [[True, False, False]]
    assert torch.equal(grown_and_pruned(V, torch.ones(1, 3), keep, torch.ones(3), 3.0, 5), keep)


def test_nothing_goes_and_a_mask_is_of_truth_values():
    for mask in ("row", "matrix"):
        got = kept(torch.rand(2, 3), mask, 0.1)
        assert got.dtype == torch.bool and got.all()


def test_rows_are_taken_some_millions_of_entries_at_a_time():
    for rows, width, parts in ((10, PANEL, 10), (10, PANEL // 2, 5), (PANEL, 1, 1),
                               (PANEL + 1, 1, 2), (10, 2 * PANEL, 10), (3, 0, 1)):
        found = list(panels(rows, width))
        assert len(found) == parts and found[0].start == 0 and found[-1].stop >= rows


def test_what_brings_nothing_on_average_is_no_counterweight():
    """e = -4: -3 comes back, and of those kept 0.4 goes, though 0 has the lower score."""
    V = torch.tensor([[-1.0, -3.0, 0.0, 0.4]])
    keep = torch.tensor([[False, False, True, True]])
    got = grown_and_pruned(V, torch.tensor([[9.0, 9.0, 1.0, 5.0]]), keep, torch.ones(4), 0.1, 1)
    assert got.tolist() == [[False, True, True, False]]
