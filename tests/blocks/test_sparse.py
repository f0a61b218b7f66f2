"""Sparse deltas: portable indices, and both evaluations against a dense matrix."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.blocks.weight import panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.sparse import SparseDelta, spread
from burnish.core.site import Place

OUT, IN, N = 24, 20, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 5000), share=st.floats(0, 1), seed=st.integers(0, 2**31),
       key=st.text(max_size=8))
def test_positions_are_distinct_and_inside(n, share, seed, key):
    k = max(1, int(share * n))
    got = spread(n, k, seed, key)
    assert got.shape == (k,) and got.dtype == torch.int64
    assert got.unique().numel() == k
    assert 0 <= int(got.min()) and int(got.max()) < n


def test_all_positions_are_a_permutation():
    assert torch.equal(spread(1000, 1000, 3).sort().values, torch.arange(1000))


def test_more_positions_than_there_are_are_an_error():
    assert spread(3, 3, 0).unique().numel() == 3
    with pytest.raises(ValueError, match="4 distinct entries of 3"):
        spread(3, 4, 0)


def test_positions_are_the_same_on_every_machine():
    """The seed is a file format: these numbers never change."""
    assert spread(4096 * 11008, 4, 0, "layers.0.q_proj.weight").tolist() == \
        [33838433, 18561293, 16899024, 12777312]
    assert spread(1000, 6, 7, "w").tolist() == [899, 703, 514, 46, 776, 523]


def test_positions_look_random():
    """No row and no column is preferred: counts scatter as a binomial does."""
    k = 64 * 64 // 8
    index = spread(64 * 64, k, 0)
    for counts in ((index // 64).bincount(minlength=64), (index % 64).bincount(minlength=64)):
        assert counts.float().std() < 2 * (k / 64) ** 0.5
    assert spread(4096, 50, 0).tolist() != spread(4096, 50, 1).tolist()
    assert spread(4096, 50, 0, "a").tolist() != spread(4096, 50, 0, "b").tolist()


def few_columns():
    rows, cols = torch.meshgrid(torch.arange(0, OUT, 2), torch.tensor([3, 11]), indexing="ij")
    return (rows * IN + cols).flatten()


INDEX = {"few columns": few_columns, "everywhere": lambda: spread(OUT * IN, 60, 0),
         "all": lambda: torch.arange(OUT * IN)}


def delta(index):
    term = SparseDelta(PLACE, index, portable=False).double()
    torch.nn.init.normal_(term.values)
    return term


@pytest.mark.parametrize("panel", [panels.PANEL, 5 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("index", INDEX)
def test_values_get_the_entries_of_the_dense_gradient(index, panel, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    term = delta(INDEX[index]())
    assert term.tokenwise == (index == "few columns")
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(N, OUT, dtype=torch.float64)
    y = linear(x, Weighted(lambda: W, [(term, 0.8)]), None)
    dx, dv = torch.autograd.grad(y, [x, term.values], g)
    dense = (W + 0.8 * term.dense().detach()).requires_grad_()
    x2 = x.detach().requires_grad_()
    ref = F.linear(x2, dense)
    dx_ref, dW = torch.autograd.grad(ref, [x2, dense], g)
    torch.testing.assert_close(y, ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, dx_ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dv, 0.8 * dW.flatten()[term.index.long()], rtol=1e-12, atol=1e-12)


def test_few_columns_keep_only_those():
    kept = []
    term = delta(few_columns())
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t,
                                                  lambda t: t):
        linear(x, Weighted(lambda: torch.zeros(OUT, IN, dtype=torch.float64),
                           [(term, 1.0)]), None)
    assert kept == [(N, 2)]


def test_the_file_holds_the_index_unless_it_can_be_drawn_again():
    drawn = SparseDelta(PLACE, spread(OUT * IN, 9, 0), portable=True)
    chosen = SparseDelta(PLACE, spread(OUT * IN, 9, 0), portable=False)
    assert set(drawn.state_dict()) == {"values"}
    assert set(chosen.state_dict()) == {"values", "index"}
    assert chosen.index.dtype == torch.int32


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_another_index_brings_its_own_columns(how):
    """A file's index may differ from the one drawn here; nothing of the old one may stay."""
    term = delta(few_columns())
    rows = torch.arange(0, OUT, 2)
    other = SparseDelta(PLACE, torch.cat([rows * IN + 5, rows * IN + 17]), False).double()
    torch.nn.init.normal_(other.values)
    term = copy.deepcopy(term) if how == "copied" else term
    with torch.no_grad():
        for name, t in term.state_dict().items():
            t.copy_(other.state_dict()[name])
    x = torch.randn(N, IN, dtype=torch.float64)
    W = torch.zeros(OUT, IN, dtype=torch.float64)
    got = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    torch.testing.assert_close(got, F.linear(x, other.dense()))


def test_disjoint_updates_add():
    a, b = delta(torch.arange(0, 30)), delta(torch.arange(30, 60))
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64)
    got = linear(x, Weighted(lambda: W, [(a, 1.0), (b, 1.0)]), None)
    torch.testing.assert_close(got, F.linear(x, W + a.dense() + b.dense()))
