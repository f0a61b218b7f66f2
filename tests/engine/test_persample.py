"""Norms of each sample's own gradient, against one backward per sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.persample import product_norms, sum_norms
from burnish.testing.models import tiny


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 40, 3, 2)])
def test_both_forms_are_the_norm_of_the_product(shape):
    B, T, M, N = shape
    a, b = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, T, N, dtype=torch.float64)
    want = torch.einsum("btm,btn->bmn", a, b).square().sum((1, 2))
    torch.testing.assert_close(product_norms(a, b), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum_norms(a), a.sum(1).square().sum(-1), rtol=1e-12, atol=0)


def one_by_one(tuned, batch):
    """sqrt of the summed squares of B x (the sample's part of the mean loss): stock autograd."""
    n = next(iter(batch.values())).shape[0]
    out = []
    for i in range(n):
        value = tuned.loss({k: v[i: i + 1] for k, v in batch.items()})
        grads = torch.autograd.grad(value, list(tuned.parameters()), allow_unused=True)
        out.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(out)


@pytest.mark.parametrize("recipe", [
    "lora(rank=3)", "lora(rank=3, train_a=False)", "pissa(rank=3)", "adalora(rank=2, init_rank=3)",
    "snella(rank=4)", "shira(rank=4)",
    "vera(rank=8)", "miss(rank=4)", "full", "bitfit", "dora(rank=3)",
    "fact(rank=4)", "houlsby", "norms", "lora(rank=3) + checkpoint",
    "nf4 + lora(rank=3)"])
@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_norms_are_those_of_one_backward_per_sample(recipe, model):
    net, batch = tiny(model)
    batch = {k: torch.cat([v, v.flip(0)[:1]]) if k != "labels" else torch.cat([v, v[:1]])
             for k, v in batch.items()}
    tuned = burnish.tune(net, recipe, head=False)
    net.eval()
    with torch.no_grad():
        for i, p in enumerate(tuned.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    got, want = tuned.sample_norms(batch), one_by_one(tuned, batch)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())


def test_a_layer_called_twice_is_one_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x))).square().mean()

    net = Twice().double()
    tuned = burnish.tune(net, "lora(rank=2)", targets="a")
    net.a.burnish.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    got = tuned.sample_norms({"x": x})
    torch.testing.assert_close(got, one_by_one(tuned, {"x": x}), rtol=1e-10, atol=0)


def test_no_gradient_of_matrix_size_is_made():
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    tuned = burnish.tune(net, "lora(rank=2)", targets="0")
    term = net[0].burnish.default["lora"]
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func is not torch.ops.aten.t.default:
                shapes.append(out.numel())
            return out

    x, g = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with Watch():
        term.sample_norms(x, g)
    assert max(shapes) <= 2 * 3 * 64
    assert tuned is not None
