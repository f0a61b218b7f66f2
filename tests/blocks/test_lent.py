"""Steps that are lent: where they lead, and that nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.update.lent import lent
from burnish.blocks.update.rules import SGD


def tensors(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=g).to(dtype))
            for n, s in {"a": (3, 4), "b": (4,), "rests": (2,)}.items()}


def loss(params):
    return ((params["a"] @ params["b"]) ** 2).sum() + params["b"].sin().sum()


def gradients(params):
    return dict(zip("ab", torch.autograd.grad(loss(params), [params["a"], params["b"]]),
                    strict=True))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rule, theirs", [
    (None, lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.01)),
    (SGD(momentum=0.9, weight_decay=0.2),
     lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.2))])
def test_they_are_the_steps_of_torch_from_nothing(steps, rule, theirs):
    params, want = tensors(), tensors()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = theirs([want["a"], want["b"]])
    for _ in range(steps):
        optimizer.zero_grad()
        loss(want).backward()
        optimizer.step()
    for _ in range(2):                               # moments of the first are not the second's
        with lent(params, lambda: gradients(params), steps, 0.1, rule):
            for n, p in params.items():
                torch.testing.assert_close(p, want[n], rtol=1e-12, atol=1e-12)
            assert torch.equal(params["rests"], before["rests"])
            assert not torch.equal(params["a"], before["a"])
        assert all(torch.equal(p, before[n]) for n, p in params.items())


def test_steps_of_half_precision_are_computed_in_fp32():
    params, want = tensors(torch.bfloat16), tensors(torch.bfloat16)
    for n, g in gradients(want).items():
        want[n].data = (want[n].data.float() - 0.1 * g.float()).bfloat16()
    with lent(params, lambda: gradients(params), 1, 0.1, SGD()):
        for n, p in params.items():
            assert torch.equal(p, want[n])


def test_an_error_inside_puts_them_back():
    params = tensors()
    before = {n: p.detach().clone() for n, p in params.items()}
    told = iter((gradients(params),))
    for where in (lambda: gradients(params), lambda: next(told)):
        with pytest.raises((ZeroDivisionError, StopIteration, RuntimeError)), \
                lent(params, where, 2, 0.1):
            raise ZeroDivisionError
        assert all(torch.equal(p, before[n]) for n, p in params.items())
