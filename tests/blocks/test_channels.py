"""Kept channels of a convolution, by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.weight.channels import KernelSlice
from burnish.blocks.weight.integer import codes, decoded, grid_of
from burnish.core.site import Place


def made(groups=1, at=(4, 1, 6), dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups, bias=False).to(dtype)
    place = Place("c", "weight", "conv", 12, 8 // groups * 9, kernel=9, axes=(3, 3), groups=groups)
    term = KernelSlice(place, torch.tensor(at)).to(dtype)
    if term.V is not None:
        nn.init.normal_(term.V)
    return conv, term, torch.randn(2, 8, 7, 6, dtype=dtype, requires_grad=True)


def by_weight(conv, term, x):
    """A convolution with the update as its weight."""
    return torch.func.functional_call(conv, {"weight": term.dense().view(conv.weight.shape)}, (x,))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_the_convolution_with_its_dense_form(groups):
    conv, term, x = made(groups)
    assert term.at.tolist() == [1, 4, 6] and term.V.shape == (3, 12 // groups * 9)
    assert term.dense().count_nonzero() == term.V.numel()
    got, want = term.beside(conv, x), by_weight(conv, term, x)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.V], g),
                    torch.autograd.grad(want, [x, term.V], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 4])
def test_what_nobody_asks_for_is_neither_kept_nor_made(groups):
    kept = []

    def pack(t):
        kept.append(t)
        return t

    conv, term, x = made(groups)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (dV,) = torch.autograd.grad(term.beside(conv, x.detach()).sum(), term.V)
        want = torch.autograd.grad(by_weight(conv, term, x).sum(), [x, term.V])
        torch.testing.assert_close(dV, want[1])
        assert [tuple(t.shape) for t in kept[:2]] == [(2, 3, 7, 6), tuple(term.V.shape)]
        term.V.requires_grad_(False)
        kept.clear()
        (dx,) = torch.autograd.grad(term.beside(conv, x).sum(), x)
    assert [tuple(t.shape) for t in kept] == [tuple(term.V.shape)]
    torch.testing.assert_close(dx, want[0])


def test_on_a_grid_the_codes_are_kept():
    conv, term, x = made(dtype=torch.float32)
    grid = term.grid = grid_of(-3.0, 3.0)
    q = torch.randint(-128, 128, x.shape)
    x = (q - grid.zero) * grid.scale
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = term.beside(conv, x)
    assert kept[0].dtype == torch.int8 and torch.equal(kept[0].long(), q[:, [1, 4, 6]])
    (got,) = torch.autograd.grad(y.square().sum(), term.V)
    (want,) = torch.autograd.grad(by_weight(conv, term, x).square().sum(), term.V)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_are_of_numbers_on_the_grid(dtype):
    grid = grid_of(-0.7, 2.3)
    q = torch.arange(-128, 128)
    x = ((q - grid.zero).double() * grid.scale).to(dtype)
    got = codes(x, grid)
    assert got.dtype == torch.int8 and decoded(got, grid, dtype).dtype == dtype
    if dtype != torch.bfloat16:                          # which cannot tell all of them apart
        assert torch.equal(got.long(), q)
    torch.testing.assert_close(decoded(got, grid, dtype), x, rtol=torch.finfo(dtype).eps, atol=0)
    assert codes(x, None) is x and decoded(x, None, torch.float32).dtype == torch.float32


def test_autocast_has_its_say():
    conv, term, x = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = term.beside(conv, x), by_weight(conv, term, x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.V], g),
                    torch.autograd.grad(want, [x, term.V], g), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-1)


def test_no_channels_are_nothing():
    conv, term, x = made(at=())
    assert term.beside(conv, x) is None and term.V is None and not list(term.parameters())
    assert torch.equal(term.dense(), torch.zeros(12, 72)) and term.counted == {"channels": 0}


def test_v_that_has_changed_since_is_an_error():
    conv, term, x = made()
    y = term.beside(conv, x)
    with torch.no_grad():
        term.V.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()
