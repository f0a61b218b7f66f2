"""OLoRA against its equations in plain float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.site import Place


def tuned(recipe, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 7)).to(dtype)
    handle = burnish.tune(net, recipe, targets="0", head=False)
    return handle, net[0].burnish.default["olora"]


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_factors_are_the_first_of_the_qr(alpha):
    """B0 A0 = Q[:, :r] R[:r]; signs of a QR are free, the product is not."""
    handle, term = tuned("olora(rank=3)" if alpha is None else f"olora(rank=3, alpha={alpha})")
    W = handle.model[0].weight.detach()
    Q, R = torch.linalg.qr(W)
    A, B = term.A.detach(), term.B.detach()
    assert term.scale == (1.0 if alpha is None else 2.0)
    torch.testing.assert_close(B @ A, Q[:, :3] @ R[:3], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(B.t() @ B, torch.eye(3, dtype=W.dtype), rtol=0, atol=1e-13)
    torch.testing.assert_close(A[:, :3].tril(-1), torch.zeros(3, 3, dtype=W.dtype), rtol=0,
                               atol=1e-13)


def test_the_first_columns_of_the_residual_are_nothing():
    handle, term = tuned("olora(rank=3)")
    W = handle.model[0].weight.detach()
    left = W - term.B.detach() @ term.A.detach()
    assert left[:, :3].abs().max() < 1e-14 < left[:, 3:].abs().max()
    assert (term.B.detach().t() @ left).abs().max() < 1e-14


def test_outputs_and_gradients_are_those_of_the_equation():
    """W' = (W - s Q_r R_r) + s B A after both factors have moved."""
    handle, term = tuned("olora(rank=3, alpha=6)")
    W, bias = (p.detach().clone() for p in (handle.model[0].weight, handle.model[0].bias))
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(handle.model(x), x @ W.t() + bias, rtol=1e-12, atol=1e-12)
        for p in handle.parameters():
            p.add_(0.1 * torch.randn_like(p))
    Q, R = torch.linalg.qr(W)
    A, B = (p.detach().clone().requires_grad_() for p in (term.A, term.B))
    want = x @ (W - 2 * Q[:, :3] @ R[:3] + 2 * B @ A).t() + bias
    got = handle.model(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.A, term.B], g),
                    torch.autograd.grad(want, [x, A, B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(handle.merge()(x), want, rtol=1e-10, atol=1e-10)


def test_columns_that_are_nothing_have_a_basis_too():
    net = nn.Sequential(nn.Linear(10, 7))
    with torch.no_grad():
        net[0].weight[:, 1] = 0
    burnish.tune(net, "olora(rank=3)", targets="0", head=False)
    B = net[0].burnish.default["olora"].B.detach()
    torch.testing.assert_close(B.t() @ B, torch.eye(3), rtol=0, atol=1e-5)


def test_fewer_outputs_than_columns_are_refused():
    with pytest.raises(burnish.RecipeError, match="^olora: rank 8 does not fit 0.weight"):
        tuned("olora(rank=8)")


def test_the_count_on_llama():
    method = burnish.parse("olora(rank=8)")[0]
    assert 32 * 2 * method.count(Place("q", "weight", "linear", 4096, 4096)) == 4_194_304


def test_defaults_are_the_published_ones():
    assert burnish.parse("olora")[0].settings() == {"targets": None, "rank": 32, "alpha": None}
