"""Chains of several adapters in one batch, against each sample by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.folded import Room
from burnish.blocks.weight.grouped import Grouped
from burnish.blocks.weight.start import LessStart
from burnish.blocks.weight.triplets import Triplets
from burnish.core.site import Place

PLACE = Place(path="", param="weight", kind="linear", out=5, inp=6)


def term(kind, rank, seed, scale=0.7):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(PLACE, rank, scale).double()
        for t in (*made.parameters(), *made.buffers()):
            nn.init.normal_(t)
        return made.requires_grad_(False)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=9),
       ranks=st.lists(st.integers(1, 9), min_size=4, max_size=4), tokens=st.integers(1, 3),
       graph=st.booleans(), columns=st.sampled_from([None, (2, 7)]))
def test_each_sample_gets_its_own_update(rows, ranks, tokens, graph, columns):
    kinds = dict(zip("abcd", (Chain, LessStart, Triplets, Chain), strict=True))
    terms = {n: [(term(kinds[n], r, r), 1.0)] for n, r in zip("abcd", ranks, strict=True)}
    terms["d"].append((term(Chain, 2, 77), 0.5))                  # two on one weight
    x = torch.randn(len(rows), tokens, 6, dtype=torch.float64)
    y = torch.randn(len(rows), tokens, 9 if columns else 5, dtype=torch.float64)
    want = y.clone()
    a, b = columns or (0, 5)
    for i, name in enumerate(rows):
        for t, s in terms.get(name, ()):
            want[i, :, a:b] += s * F.linear(x[i], t.dense())
    grouped = Grouped(terms, rows, columns, Room())
    with torch.set_grad_enabled(graph):
        for _ in range(2):                                        # the second finds what was kept
            torch.testing.assert_close(grouped.add(x, y.clone()), want, rtol=1e-12, atol=1e-12)


def test_the_input_gets_the_gradient_of_each_samples_update():
    terms = {n: [(term(Chain, r, r), 1.0)] for n, r in (("a", 2), ("b", 3))}
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(4, 2, 5, dtype=torch.float64)
    rows, g = ["b", "a", None, "b"], torch.randn(4, 2, 5, dtype=torch.float64)
    got, = torch.autograd.grad(Grouped(terms, rows).add(x, y), x, g)
    want = torch.stack([g[i] @ terms[n][0][0].dense() if n else torch.zeros(2, 6)
                        for i, n in enumerate(rows)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_as_many_products_for_forty_adapters_as_for_four():
    def products(n):
        terms = {f"a{i}": [(term(Chain, 5 + i % 3, i), 1.0)] for i in range(n)}     # ranks 5 to 7
        grouped = Grouped(terms, list(terms))
        with torch.profiler.profile() as ran, torch.no_grad():
            grouped.add(torch.randn(n, 1, 6).double(), torch.zeros(n, 1, 5).double())
        return sum(e.count for e in ran.key_averages() if e.key in (
            "aten::bmm", "aten::baddbmm_", "aten::mm", "aten::addmm", "aten::addmm_"))
    assert products(40) == products(4) == 2


def other_memory(t):
    for _ in range(3):
        t.A.data = torch.randn_like(t.A)


def same_memory(t):
    """Another matrix over the same numbers, whose count of changes stands where it stood."""
    t.A.data = t.A.data.view(6, -1).t()


def replaced(t):
    t._parameters["B"] = nn.Parameter(t.B.detach() * 2, requires_grad=False)


@pytest.mark.parametrize("change", [
    lambda t: t.A.mul_(2), lambda t: nn.init.ones_(t.B), lambda t: setattr(t, "scale", 9.0),
    other_memory, same_memory, replaced], ids=["A", "B", "scale", "memory", "layout", "another"])
@torch.no_grad()
def test_a_change_of_an_adapter_is_seen(change):
    t, room = term(Chain, 2, 0), Room()
    grouped = Grouped({"a": [(t, 1.0)]}, ["a", None], None, room)
    x, y = torch.randn(2, 3, 6).double(), torch.zeros(2, 3, 5).double()
    before = grouped.add(x, y.clone())
    assert room.held and room.tensors()
    change(t)
    after = grouped.add(x, y.clone())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after[0], F.linear(x[0], t.dense()), rtol=1e-12, atol=1e-12)
    assert len(room.held) == 1, "the old ones are gone"


@torch.no_grad()
def test_what_is_kept_goes_with_the_room_the_batch_and_never_into_copies():
    t, room = term(Chain, 2, 0), Room()
    grouped = Grouped({"a": [(t, 1.0)]}, ["a"], None, room)
    x, y = torch.randn(1, 3, 6).double(), torch.zeros(1, 3, 5).double()
    want = grouped.add(x, y.clone())
    room.clear()
    assert not room.tensors()
    assert torch.equal(grouped.add(x, y.clone()), want)
    for twin in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        assert not twin.kept
        assert torch.equal(twin.add(x, y.clone()), want)
    grouped.let_go()
    assert not room.held


@torch.no_grad()
def test_half_precision_and_autocast_keep_the_dtype_of_the_product():
    terms = {n: [(term(Chain, 2, i).float(), 1.0)] for i, n in enumerate("ab")}
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    want = torch.stack([y[i] + F.linear(x[i], terms[n][0][0].dense()) for i, n in enumerate("ba")])
    got = Grouped(terms, "ba").add(x.bfloat16(), y.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = Grouped(terms, "ba").add(x, y.bfloat16())
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), want, rtol=3e-2, atol=5e-2)
