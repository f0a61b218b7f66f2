"""8-bit and 4-bit Adam: bytes per parameter, what stays fp32, and the loss of fp32 Adam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.update.step import compose
from burnish.core.recipe import parse


def build(recipe, named, lr, **kw):
    return compose([m.optimizer() for m in parse(recipe)], named, lr, **kw)


def held(state):
    return sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("recipe, per", [("adam8bit", 2 * (1 + 4 / 256)),
                                         ("adam4bit", 2 * (0.5 + 4 / 128))])
def test_bytes_per_parameter(recipe, per):
    p = nn.Parameter(torch.zeros(256, 64))
    opt = build(recipe, [("w", p)], 1e-3)
    p.grad = torch.ones_like(p)
    opt.step()
    assert held(opt.state[p]) == per * p.numel()


def test_small_tensors_keep_fp32_state():
    p, q = nn.Parameter(torch.zeros(4095)), nn.Parameter(torch.zeros(4096))
    opt = build("adam8bit", [("p", p), ("q", q)], 1e-3)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert opt.state[q]["exp_avg.codes"].dtype == torch.uint8


def test_constant_gradients_move_as_adam_does():
    p = nn.Parameter(torch.zeros(4100))                 # the last block is short
    opt = build("adam8bit", [("w", p)], 1e-2)
    for _ in range(10):
        p.grad = torch.full_like(p, 0.3)
        opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.1), rtol=0.02, atol=0)


def test_a_tiny_gradient_beside_a_huge_one_does_not_explode():
    p = nn.Parameter(torch.zeros(4096))
    opt = build("adam8bit", [("w", p)], 1e-2)
    for _ in range(20):
        p.grad = torch.full_like(p, 1e-6)
        p.grad[::256] = 100.0                           # one in every block
        opt.step()
    assert p.detach().abs().max() <= 20 * 1e-2 * 1.05   # no coordinate moves faster than lr


@pytest.mark.parametrize("recipe, tol", [("adam8bit", 0.01), ("adam4bit", 0.05)])
def test_the_loss_is_that_of_fp32_adam(recipe, tol):
    def final(optimizer):
        g = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 160), nn.Tanh(), nn.Linear(160, 64))
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
        x = torch.randn(2048, 32, generator=g)
        y = torch.tanh(x @ torch.randn(32, 64, generator=g) * 0.3)
        y += 0.3 * torch.randn(2048, 64, generator=g)
        opt = build(optimizer, model.named_parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, 250)
        for _ in range(250):
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        return loss.item()

    assert final(recipe) == pytest.approx(final("adamw"), rel=tol)
