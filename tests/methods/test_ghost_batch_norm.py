"""Ghost batch norm against norms that were given the runs one by one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64 = torch.float64


class Net(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4) if flat else nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4) if flat else nn.BatchNorm2d(4)
        with torch.no_grad():
            self.norm.weight.normal_()
            self.norm.bias.normal_()

    def forward(self, x):
        return self.norm(self.first(x))


def data(n, flat=False):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=g, dtype=F64) if flat else \
        torch.randn(n, 3, 5, 5, generator=g, dtype=F64)
    return x * torch.arange(1, n + 1).view(-1, *(1,) * (x.dim() - 1))       # runs that differ


def joined(batch, flat=False, model=None):
    model = Net(flat).double() if model is None else model
    return model, burnish.tune(model, f"full + ghost_batch_norm(ghost={batch})", head=False)


def separately(net, x, runs):
    """The outputs of the runs given one by one, each normalised in float64 by hand; running
    statistics by the sum, (1 - e)^k r + sum_i (1 - e)^(k - i) e_i s_i."""
    norm, ys, e = net.norm, [], 0.1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    axes = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    size, at = runs[0], 0
    for n in runs:
        h = net.first(x[at : at + n])
        at += n
        m = h.mean(axes)
        v = (h - m.view(shape)).square().mean(axes)
        ys.append((h - m.view(shape)) / (v.view(shape) + 1e-5).sqrt() * norm.weight.view(shape)
                  + norm.bias.view(shape))
        share, count = e * min(1, n / size), h.numel() / h.shape[1]
        mean = (1 - share) * mean + share * m.detach()
        var = (1 - share) * var + share * v.detach() * count / (count - 1)
    return torch.cat(ys), mean, var


@pytest.mark.parametrize("flat, batch, n, runs", [
    (False, 2, 6, [2, 2, 2]), (False, 4, 10, [4, 4, 2]), (False, 3, 7, [3, 3, 1]),
    (True, 3, 9, [3, 3, 3]), (True, 3, 8, [3, 3, 2]), (True, 3, 7, [3, 4]), (True, 5, 6, [6])])
def test_outputs_gradients_and_statistics_are_those_of_the_runs(flat, batch, n, runs):
    net, _ = joined(batch, flat)
    other, x = Net(flat).double(), data(n, flat)
    for _ in range(2):
        a, b = (x.clone().requires_grad_() for _ in range(2))
        want, mean, var = separately(other, b, runs)
        got = net(a)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        g = torch.randn_like(want)
        for p, q in zip(torch.autograd.grad(got, [a, *net.parameters()], g),
                        torch.autograd.grad(want, [b, *other.parameters()], g), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(net.norm.running_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net.norm.running_var, var, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            other.norm.running_mean.copy_(mean)
            other.norm.running_var.copy_(var)
    assert net.norm.momentum == 0.1


def test_runs_as_long_as_the_batch_are_batch_norm():
    for batch in (6, 7):
        net, _ = joined(batch)
        other, x = Net().double(), data(6)
        assert torch.equal(net(x), other(x))
        assert torch.equal(net.norm.running_var, other.norm.running_var)


def test_a_mean_over_all_runs():
    """momentum=None: every run counts alike."""
    net, _ = joined(2)
    net.norm.momentum = None
    other = Net().double()
    other.norm.momentum = None
    x = data(6)
    with torch.no_grad():
        net(x)
        for part in x.split(2):
            other(part)
    torch.testing.assert_close(net.norm.running_mean, other.norm.running_mean)
    assert int(net.norm.num_batches_tracked) == 3


def test_evaluation_and_frozen_norms_are_left_alone():
    net, tuned = joined(2)
    x = data(6)
    before = copy.deepcopy(net.norm.state_dict())
    net.eval()
    plain = Net().double().eval()
    assert torch.equal(net(x), plain(x))
    assert all(torch.equal(v, before[k]) for k, v in net.norm.state_dict().items())
    net.train()
    net.norm.eval()                                  # frozen later
    plain.train()
    plain.norm.eval()
    assert torch.equal(net(x), plain(x))
    net.norm.train()
    with tuned.disabled():
        one = net(x)
    assert torch.equal(one, Net().double()(x))


def test_a_model_without_batch_norms_of_its_own_is_refused():
    with pytest.raises(RecipeError, match="ghost_batch_norm needs batch norms of one process"):
        burnish.tune(tiny("llama")[0], "full + ghost_batch_norm", head=False)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    with pytest.raises(RecipeError, match="ghost_batch_norm needs batch norms of one process"):
        burnish.tune(synced, "full + ghost_batch_norm", head=False)


def test_of_two_norms_the_frozen_one_stays():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).double().eval()
    tuned = burnish.tune(model, "full + ghost_batch_norm(ghost=2)", head=False)
    model[1].train()                                 # whatever it was when the recipe came
    x = data(6, flat=True)
    h = nn.BatchNorm1d(3).double().eval()(x)
    want = torch.cat([nn.BatchNorm1d(3).double()(p) for p in h.split(2)])
    torch.testing.assert_close(tuned.model(x), want)


def test_the_learning_rate_grows_with_the_root_of_the_batch():
    net, _ = joined(2)
    for settings, factor in (("ghost=2, united=32", 4.0), ("ghost=2", 1.0),
                             ("united=4096", math.sqrt(32))):
        tuned = burnish.tune(Net().double(), f"full + adamw(weight_decay=0.1) + "
                             f"ghost_batch_norm({settings})", head=False)
        opt = tuned.optimizer(lr=1e-3)
        assert type(opt) is torch.optim.AdamW
        assert all(g["lr"] == pytest.approx(1e-3 * factor) for g in opt.param_groups)
        assert any(g["weight_decay"] == 0.1 for g in opt.param_groups)


def test_what_cannot_act_is_refused():
    for settings in ("ghost=0", "ghost=8, united=4"):
        with pytest.raises(RecipeError, match="ghost_batch_norm: ghost=.*expected at least 1"):
            parse(f"ghost_batch_norm({settings})")
    with pytest.raises(RecipeError, match="width_rule and ghost_batch_norm cannot.*groups of the "
                                          "optimizer"):
        burnish.tune(Net(), "full + width_rule + ghost_batch_norm(united=256)", head=False)


def test_its_settings():
    (made,) = parse("ghost_batch_norm")
    assert (made.ghost, made.united) == (128, 0)
