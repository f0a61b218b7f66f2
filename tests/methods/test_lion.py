"""Lion: equal steps, one moment, and no dependence on the loss's scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.update.step import compose
from burnish.core.recipe import parse


def run(grads, recipe="lion", lr=2**-8, start=None, **kw):
    p = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("w", p)], lr, **kw)
    path = [p.detach().clone()]
    for g in grads:
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return path, opt.state[p]


def gradients(steps=12, n=500):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=g) for _ in range(steps)]


def test_every_coordinate_moves_exactly_lr():
    path, _ = run(gradients())
    for a, b in zip(path, path[1:], strict=False):
        assert torch.equal((b - a).abs(), torch.full_like(a, 2**-8))


def test_the_equations_in_fp64():
    grads = [g.double() for g in gradients()]
    start = torch.linspace(-1, 1, 500, dtype=torch.float64)
    path, _ = run(grads, "lion(betas=(0.95, 0.98))", 1e-3, start, weight_decay=0.3)
    w, m = start.clone(), torch.zeros_like(start)
    for g in grads:
        w = w - 1e-3 * (torch.sign(0.95 * m + 0.05 * g) + 0.3 * w)
        m = 0.98 * m + 0.02 * g
    torch.testing.assert_close(path[-1], w, rtol=1e-12, atol=1e-12)


def test_state_is_one_element_per_weight():
    _, state = run(gradients(2))
    assert sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)) == 500
    _, state = run(gradients(2), "lion(state='bf16')")
    assert sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor)) == 1000


def test_the_scale_of_the_loss_does_not_matter():
    path, _ = run(gradients())
    for factor in (10.0, 1e-3):
        other, _ = run([g * factor for g in gradients()])
        assert all(torch.equal(a, b) for a, b in zip(path, other, strict=True))


def test_a_dead_coordinate_is_only_decayed():
    grads = [torch.tensor([0.0, 1.0])] * 3
    path, _ = run(grads, lr=0.1, start=torch.ones(2), weight_decay=0.5)
    assert path[-1][0].item() == pytest.approx(0.95**3)


def test_bf16_momentum_follows_fp32():
    a, _ = run(gradients(40))
    b, _ = run(gradients(40), "lion(state='bf16')")
    agree = torch.stack([(x1 - x0).sign() == (y1 - y0).sign()
                         for x0, x1, y0, y1 in zip(a, a[1:], b, b[1:], strict=False)])
    assert agree.float().mean() > 0.97
