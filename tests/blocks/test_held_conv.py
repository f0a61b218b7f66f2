"""A frozen convolution: torch's own outputs and gradients, and nothing kept for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.held_conv import convolved, served

SHAPES = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2)), (3, 4, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False), (2, 4, 9, 8)),
    "by groups": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "one axis": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "three axes": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
}


def made(which):
    torch.manual_seed(0)
    conv, shape = SHAPES[which]
    conv = conv().double()
    conv.weight.requires_grad_(False)
    return conv, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def run(conv, x):
    return convolved(conv, x, lambda: conv.weight, [conv.weight])


@pytest.mark.parametrize("which", SHAPES)
def test_outputs_and_gradients_are_torch_s(which):
    conv, x = made(which)
    got, want = run(conv, x), conv(x)
    torch.testing.assert_close(got, want)
    wanted = [x] if conv.bias is None else [x, conv.bias]
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_who_asks_for_one_gradient_gets_it_alone():
    conv, x = made("plain")
    asked = []
    y = convolved(conv, x.detach(), lambda: asked.append(1) or conv.weight, [conv.weight])
    (db,) = torch.autograd.grad(y.sum(), conv.bias)
    assert len(asked) == 1                               # in forward alone
    torch.testing.assert_close(db, torch.full_like(db, 2 * 7 * 6))
    conv.bias.requires_grad_(False)
    (dx,) = torch.autograd.grad(run(conv, x).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(conv(x).sum(), x)[0])
    assert not run(conv, x.detach()).requires_grad


def test_nothing_is_kept_and_the_weight_is_asked_for_again():
    conv, x = made("strided")
    asked, kept = [], []

    def weight():
        asked.append(1)
        return conv.weight

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = convolved(conv, x, weight, [conv.weight])
    assert not kept and len(asked) == 1
    y.sum().backward()
    assert len(asked) == 2


def test_a_weight_that_has_changed_since_is_an_error():
    conv, x = made("plain")
    y = run(conv, x)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="frozen weight, needed for backward, was modified"):
        y.sum().backward()
    y = run(conv, x.detach())                            # the gradient of the bias reads no weight
    with torch.no_grad():
        conv.weight.mul_(2)
    y.sum().backward()


def test_autocast_has_its_say():
    conv, x = made("plain")
    conv, x = conv.float(), x.detach().float().requires_grad_()
    other = copy.deepcopy(conv)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = run(conv, x), other(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    a, b = torch.autograd.grad(got, [x, conv.bias], g), torch.autograd.grad(
        want, [x, other.bias], g)
    for u, v in zip(a, b, strict=True):
        assert u.dtype == v.dtype == torch.float32
        torch.testing.assert_close(u, v, rtol=2e-2, atol=2e-2)


def test_what_has_no_form_here_is_told():
    x = torch.ones(1, 2, 5, 5)
    assert served(nn.Conv2d(2, 2, 3, padding=1), x) and served(nn.Conv1d(2, 2, 3), x[0])
    assert not served(nn.Conv2d(2, 2, 3), x[0])
    assert not served(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), x)
    assert not served(nn.Conv2d(2, 2, 3, padding="same"), x)
    seen = []
    torch.func.grad(lambda x: (seen.append(served(nn.Conv2d(2, 2, 3), x)), x.sum())[1])(x)
    assert seen == [False]


@pytest.mark.parametrize("conv, x", [
    (nn.Conv2d(4, 6, 3, padding="same"), torch.randn(2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5))])
def test_what_has_no_form_here_runs_as_torch_has_it(conv, x):
    net = nn.Sequential(copy.deepcopy(conv))
    tuned = burnish.tune(net, "bf16 + bitfit", head=False, targets="0")
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    x.requires_grad_()
    got, want = net(x), conv(x)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, net[0].bias], g),
                    torch.autograd.grad(want, [x, conv.bias], g), strict=True):
        torch.testing.assert_close(a, b)
    tuned.detach()
