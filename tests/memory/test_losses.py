"""What a loss keeps (some kernels reduce in the memory of all elements), and how a norm lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import burnish
from burnish.memory.fakes import kernels

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
          "bce": F.binary_cross_entropy, "bce_logits": F.binary_cross_entropy_with_logits,
          "kl": F.kl_div, "soft_margin": F.soft_margin_loss, "poisson": F.poisson_nll_loss}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_promised_to_the_byte_whatever_its_loss(name, reduction):
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.rand(32, 48)

    def loss(out, batch):
        made = LOSSES[name](out.sigmoid(), batch[1], reduction=reduction)
        return made.sum() if reduction == "none" else made

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 48))

    said = burnish.simulate(net(), "full", (x, y), loss=loss)
    found = burnish.measure(burnish.tune(net(), "full"), (x, y), loss=loss)
    assert found.peak_bytes == said.peak_bytes
    at, were = found.timeline[-1][1], said.timeline[-1][1]
    assert at == were


class Normed(nn.Module):
    """A batch norm of states whose channels lie last, or first, in three dimensions or four."""

    def __init__(self, form):
        super().__init__()
        self.form, self.into, self.out = form, nn.Linear(8, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16) if form in ("rows", "turned") else nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.into(x)
        x = x.mT if self.form == "turned" else x.mT.contiguous() if self.form == "rows" else \
            x.mT.unflatten(2, (2, 3)) if self.form == "last" else \
            x.mT.contiguous().unflatten(2, (2, 3))
        return self.out(self.norm(x).flatten(2).mT)


@pytest.mark.parametrize("form", ["rows", "turned", "first", "last"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_is_promised_to_the_byte_however_its_input_lies(form, training):
    x = torch.randn(16, 6, 8)

    def loss(out, batch):
        return out.square().mean()

    said = burnish.simulate(Normed(form).train(training), "full", (x,), loss=loss)
    found = burnish.measure(burnish.tune(Normed(form).train(training), "full"), (x,), loss=loss)
    assert found.peak_bytes == said.peak_bytes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [
    torch.randn(4, 8, 6), torch.randn(4, 6, 8).mT, torch.randn(4, 8, 2, 3),
    torch.randn(4, 8, 2, 3).to(memory_format=torch.channels_last), torch.randn(6, 4, 8).permute(
        1, 2, 0), torch.randn(4, 3, 2, 8).permute(0, 3, 2, 1)])
def test_what_stands_for_a_batch_norm_lies_as_the_kernels_result(x, training):
    ops, stand = torch.ops.aten, kernels("cpu")
    w, b, m, v = torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)
    forward, backward = ops.native_batch_norm.default, ops.native_batch_norm_backward.default
    y, mean, rstd = forward(x, w, b, m, v, training, 0.1, 1e-5)
    rest = (w, m, v, mean, rstd, training, 1e-5, [True, True, True])
    g = torch.randn_like(y)
    with FakeTensorMode() as mode:
        def fake(t):
            return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
        made = stand[forward](*map(fake, (x, w, b, m, v)), training, 0.1, 1e-5)
        back = stand[backward](fake(g), fake(x), *map(fake, rest))
    assert [t.stride() for t in made] == [t.stride() for t in (y, mean, rstd)]
    assert [t.stride() for t in back] == [t.stride() for t in backward(g, x, *rest)]
