"""Terms in singular-value form and chains less their start, with no recipe, in plain float64."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight.start import LessStart
from burnish.blocks.weight.triplets import WAITING, Triplets, crooked
from burnish.core.site import Place

PLACE = Place("0", "weight", "linear", 7, 5)


def triplets(waiting):
    torch.manual_seed(0)
    term = Triplets(PLACE, 3, 0.7, waiting).double()
    with torch.no_grad():
        for p in term.parameters():
            p.normal_()
    full = torch.cat([term.E, torch.full((waiting,), WAITING, dtype=torch.float64)])
    return term, lambda: 0.7 * term.P @ torch.diag(full) @ term.Q


def less_start(folded):
    torch.manual_seed(0)
    term = LessStart(PLACE, 3, 0.7).double()
    assert not term.A0.any() and not term.B0.any() and not term.A0.requires_grad
    g = torch.Generator().manual_seed(1)
    A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 5), (7, 3)))
    term.begin(A.clone(), B.clone())
    with torch.no_grad():
        term.A.add_(0.5), term.B.sub_(0.3)
    if folded:
        term.absorbed()
    return term, lambda: 0.7 * (term.B @ term.A - (0 if folded else 1) * B @ A)


TERMS = {"triplets": lambda: triplets(0), "triplets that wait": lambda: triplets(2),
         "less its start": lambda: less_start(False), "folded": lambda: less_start(True)}


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", TERMS)
def test_tokens_get_the_scaled_update_and_its_gradients(name, scale):
    """y += scale x Delta^T, and the gradients of x and of every tensor of it."""
    term, delta = TERMS[name]()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 7, dtype=torch.float64)
    want = scale * x @ delta().t()
    y, dx = torch.ones(4, 7, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    with torch.no_grad():
        kept = term.forward_(x, y, scale)
        got = term.backward_(g, x, kept, dx, scale)
    torch.testing.assert_close(y - 1, want.detach(), rtol=1e-11, atol=1e-12)
    theta = term.theta()
    dense = delta()
    ref = torch.autograd.grad(scale * x @ dense.t(), [x, *theta], g, allow_unused=True)
    for a, b in zip([dx, *got], ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_a_panel_is_columns_of_the_update(name):
    term, delta = TERMS[name]()
    with torch.no_grad():
        for i, j in ((0, 2), (2, 5), (0, 5)):
            torch.testing.assert_close(term.tile(i, j, None), delta()[:, i:j], rtol=1e-11,
                                       atol=1e-12)
        torch.testing.assert_close(term.dense(), delta(), rtol=1e-11, atol=1e-12)


def test_what_a_storage_holds_is_the_weight_less_the_scaled_start():
    term, _ = less_start(False)
    W = torch.randn(7, 5, dtype=torch.float64)
    start = 0.7 * term.B0 @ term.A0
    torch.testing.assert_close(term.start(), start, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(term.fold_start(W, PLACE), W - start, rtol=1e-12, atol=1e-13)


def test_files_name_the_components_that_wait_where_some_do():
    assert triplets(0)[0].settled() == {"rank": 3}
    assert triplets(2)[0].settled() == {"rank": 3, "waiting": 2}


def test_no_terms_are_not_crooked():
    assert list(crooked([], 0.1)) == []


def test_a_frozen_factor_keeps_nothing_for_itself():
    term, _ = less_start(False)
    term.B.requires_grad_(False)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.zeros(4, 7, dtype=torch.float64)
    assert all(k is None for k in term.forward_(x, y, 1.0))
