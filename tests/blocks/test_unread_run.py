"""One run of a block by itself: what is counted, what is left out, and what makes it run whole."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.tape import unread
from burnish.blocks.tape.unread import Run, running


def products(n, inside=0):
    """What n products are told, one after the other, each with further ones inside."""
    told = []
    for _ in range(n):
        told.append(unread.begin())
        for _ in range(inside):
            assert unread.begin() is False
            unread.end()
        unread.end()
    return told


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_that_counts_leaves_nothing_out_and_sees_nothing_unread(n):
    with running(Run()) as run:
        unread.watch()
        assert products(n, inside=2) == [False] * n
    assert (run.products, run.depth, run.unread) == (n, 0, False)


def test_only_the_last_product_is_left_out_and_only_once_the_tape_watches():
    with running(Run(2, leave=True)) as run:
        assert products(2) == [False, False] and not run.unread
    with running(Run(2, leave=True)) as run:
        unread.watch()
        assert products(1) == [False] and not run.unread
        assert products(1, inside=1) == [True] and run.unread
    with running(Run(2)) as run:
        unread.watch()
        assert products(2) == [False, False] and run.unread


def test_a_product_more_than_were_counted_shows_that_the_last_was_not():
    with running(Run(1, leave=True)) as run:
        unread.watch()
        assert products(2) == [True, False] and not run.unread


def test_a_tensor_kept_behind_the_last_product_is_a_reader_and_a_weight_is_none():
    with running(Run(1)) as run:
        unread.watch()
        unread.kept(torch.ones(2))                   # before it
        unread.begin()
        unread.kept(torch.ones(2))                   # its own
        unread.end()
        unread.kept(nn.Parameter(torch.ones(2)))
        assert run.unread
        unread.kept(torch.ones(2))
        assert not run.unread


def test_the_input_of_the_product_left_out_is_first_in_backward():
    def asked(run, watch=True):
        """Before each product, in it, in one inside it, and behind it."""
        found = []
        with running(run):
            unread.watch() if watch else None
            for _ in range(2):
                found.append(unread.first_in_backward())
                unread.begin()
                found.append(unread.first_in_backward())
                unread.begin()
                found.append(unread.first_in_backward())
                unread.end(), unread.end()
                found.append(unread.first_in_backward())
        return found

    assert asked(Run(2, leave=True)) == [False] * 5 + [True, False, False]
    assert not any(asked(Run(2))) and not any(asked(Run(2, leave=True), watch=False))
    assert unread.first_in_backward() is False


def test_outside_and_in_other_threads_nothing_is_counted():
    with running(Run()) as outer:
        with running(Run()) as inner:
            products(2)
        other = threading.Thread(target=lambda: products(5))
        other.start(), other.join()
        products(1)
    with pytest.raises(ZeroDivisionError), running(outer):
        raise ZeroDivisionError
    unread.watch(), unread.kept(torch.ones(1))
    assert products(3) == [False] * 3
    assert (outer.products, inner.products, outer.watched) == (1, 2, False)


class Told:
    """A block's second run, which tells what a tape would: products, and what is kept behind."""

    def __init__(self, n=2):
        self.n, self.reads, self.fails, self.watch = n, False, False, True
        self.left = []

    def __call__(self):
        if self.watch:
            unread.watch()
        told = products(self.n)
        self.left.append(any(told))
        if self.reads:
            unread.kept(torch.ones(2))
        if self.fails and (self.fails == "always" or any(told)):
            raise ValueError("not a number")
        return len(self.left)


def test_the_second_run_is_whole_and_later_ones_leave_out_what_nobody_read():
    block, run = nn.Linear(2, 2), Told()
    assert [unread.repeated(block, 2, run) for _ in range(3)] == [1, 2, 3]
    assert run.left == [False, True, True]


@pytest.mark.parametrize("why", ["reads", "fails"])
def test_a_run_in_vain_is_followed_by_a_whole_one_and_so_are_all_later(why):
    block, run = nn.Linear(2, 2), Told()
    unread.repeated(block, 2, run)
    setattr(run, why, True)
    assert unread.repeated(block, 2, run) == 3       # the second was in vain
    assert run.left == [False, True, False]
    setattr(run, why, False)
    assert unread.repeated(block, 2, run) == 4 and unread.repeated(block, 2, run) == 5
    assert run.left[3:] == [False, False]


def test_a_block_read_from_the_first_on_never_leaves_anything_out():
    block, run = nn.Linear(2, 2), Told()
    run.reads = True
    for _ in range(3):
        unread.repeated(block, 2, run)
    assert run.left == [False] * 3


def test_a_run_nobody_watched_or_without_products_teaches_nothing():
    for run, n in ((Told(), 2), (Told(0), 0)):
        block, run.watch = nn.Linear(2, 2), n == 0
        for _ in range(3):
            unread.repeated(block, n, run)
        assert not any(run.left)


def test_a_whole_run_that_fails_is_the_callers():
    run = Told()
    run.fails = "always"
    with pytest.raises(ValueError, match="not a number"):
        unread.repeated(nn.Linear(2, 2), 2, run)
    assert run.left == [False]


@pytest.mark.parametrize("everywhere", [True, False])
def test_while_somebody_looks_on_the_run_is_whole(everywhere):
    block, run = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Told()
    unread.repeated(block, 2, run)
    look = nn.modules.module.register_module_forward_hook if everywhere \
        else block[1].register_forward_hook
    handle = look(lambda *a: None)
    try:
        unread.repeated(block, 2, run)
    finally:
        handle.remove()
    unread.repeated(block, 2, run)
    assert run.left == [False, False, True]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)])
@pytest.mark.parametrize("wanted", ["xwb", "x", "w", "b", "xb", "wb", "xw"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_left_out_is_not_a_number_and_has_the_gradients_of_the_whole(shape, wanted,
                                                                               biased):
    wanted = wanted if biased else wanted.replace("b", "") or "x"
    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    b = torch.randn(7, dtype=torch.float64) if biased else None
    leaves = [t.requires_grad_() for n, t in (("x", x), ("w", w), ("b", b)) if n in wanted]
    g = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    with running(Run(1, leave=True)) as run:
        unread.watch()
        y = unread.linear(F.linear, (x, w), {"bias": b})
    assert y.shape == g.shape and y.isnan().all() and run.unread
    kept = [t is not None for t in y.grad_fn.saved_tensors]
    assert kept == ["w" in wanted, "x" in wanted]
    want = torch.autograd.grad(F.linear(x, w, b), leaves, g)
    for a, c in zip(torch.autograd.grad(y, leaves, g), want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


class Known(torch.Tensor):
    """A tensor of somebody's own kind."""


@pytest.mark.parametrize("how", ["no run", "counted", "own kind", "autocast"])
def test_elsewhere_the_product_is_made(how):
    x, w = torch.randn(4, 5), torch.randn(7, 5)
    given = x.as_subclass(Known) if how == "own kind" else x
    want = F.linear(x, w)
    with running(None if how == "no run" else Run(1, leave=how != "counted")) as run, \
            torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        unread.watch()
        y = unread.linear(F.linear, (given,), {"weight": w})
    assert run is None or (run.products, run.depth) == (1, 0)
    torch.testing.assert_close(torch.Tensor(y.float()), want, rtol=0.05, atol=0.05)
