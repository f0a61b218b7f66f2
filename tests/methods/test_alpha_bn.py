"""Alpha-BN: against batch norms written out, and Core against torch's own steps through them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.alpha_bn import AlphaBn, core, together
from burnish.testing.models import tiny


class Written(nn.Module):
    """The equation in the place of a batch norm."""

    def __init__(self, m, alpha):
        super().__init__()
        self.weight, self.bias = nn.Parameter(m.weight.detach()), nn.Parameter(m.bias.detach())
        self.m, self.v, self.eps, self.alpha = m.running_mean, m.running_var, m.eps, alpha

    def forward(self, x):
        out = []
        for c in range(x.shape[1]):
            one = x[:, c]
            mu_t = one.mean()
            mu = self.alpha * self.m[c] + (1 - self.alpha) * mu_t
            s2 = self.alpha * self.v[c] + (1 - self.alpha) * ((one - mu_t) ** 2).mean()
            out.append(self.weight[c] * (one - mu) / (s2 + self.eps).sqrt() + self.bias[c])
        return torch.stack(out, 1)


def models(alpha, dtype=torch.float64):
    """(model in training mode, the same with norms written out, batches)"""
    torch.manual_seed(5)
    model, batch = tiny("cnn", dtype=dtype, dropout=0.3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.4)
            m.running_var.uniform_(0.4, 2)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for i in (1, 5):
        twin.features[i] = Written(twin.features[i], alpha)
    x = batch["x"]
    return model, twin, [{"x": 1.4 * torch.randn(n, *x.shape[1:], dtype=dtype) - 0.4}
                         for n in (5, 1, 4)]


def core_loss(z):
    """Entry by entry."""
    p, K, loss = z.softmax(1), z.shape[1], 0.0
    C = sum(torch.outer(row, row) for row in p)
    for i in range(K):
        for j in range(K):
            if i != j:
                loss = loss + C[i, j] / C[i].sum()
    return loss / K


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_norms_are_those_of_the_mixed_statistics(alpha):
    model, twin, stream = models(alpha)
    before = copy.deepcopy(model.state_dict())
    with AlphaBn(alpha=alpha).lifecycle(model) as adapted, torch.no_grad():
        for batch in stream:                             # one of them of a single picture
            torch.testing.assert_close(adapted(batch).logits, twin(**batch).logits, rtol=1e-9,
                                       atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training


def test_alpha_of_one_is_the_model_bit_for_bit():
    model, _, stream = models(1.0, torch.float32)
    with torch.no_grad():
        plain = [copy.deepcopy(model).eval()(**b).logits for b in stream]
    with AlphaBn(alpha=1.0).lifecycle(model) as adapted:
        assert all(torch.equal(adapted(b).logits, p) for b, p in zip(stream, plain, strict=True))


@pytest.mark.parametrize("alpha, updates", [(0.3, 1), (0.0, 2)])
def test_core_steps_are_torch_s_own_through_the_statistics(alpha, updates):
    model, twin, stream = models(alpha)
    params = [p for m in twin.modules() if isinstance(m, Written)
              for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.Adam(params, lr=0.02)
    before = copy.deepcopy(model.state_dict())
    with AlphaBn(alpha=alpha, updates=updates, step_rate=0.02).lifecycle(model) as adapted:
        for batch in stream:
            for _ in range(updates):
                z = twin(**batch).logits
                optimizer.zero_grad()
                core_loss(z).backward()
                optimizer.step()
            torch.testing.assert_close(adapted(batch).logits, z.detach(), rtol=1e-7, atol=1e-8)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {f"features.{i}.{leaf}" for i in (1, 5) for leaf in ("weight", "bias")}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_classes_that_go_together():
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    C = together(z.softmax(1))
    torch.testing.assert_close(C, C.t(), rtol=1e-14, atol=0)          # before it is normalised
    torch.testing.assert_close(core(z), core_loss(z))
    assert torch.autograd.gradcheck(core, (z,))
    sure = 400 * torch.eye(3)[[0, 1, 0]]                              # and nobody is of the third
    sure.requires_grad_()
    core(sure).backward()
    assert core(sure) == 0 and sure.grad.isfinite().all()


def test_episodes_and_targets():
    model, _, stream = models(0.5)
    method = AlphaBn(alpha=0.5, updates=2, step_rate=0.05, episodic=True)
    with method.lifecycle(model) as adapted:
        one, two = adapted(stream[0]).logits, adapted(stream[2]).logits
        assert torch.equal(adapted(stream[0]).logits, one)
        assert torch.equal(adapted(stream[2]).logits, two)
    with AlphaBn(updates=1, targets="features.5").lifecycle(model) as adapted:
        assert set(adapted.params) == {"features.5.weight", "features.5.bias"}


def test_a_tuned_model_is_adapted_with_what_it_has_learnt():
    model, _, stream = models(0.5, torch.float32)
    with AlphaBn(alpha=0.5).lifecycle(model) as adapted:
        base = adapted(stream[0]).logits
    tuned = burnish.tune(model, "lora(rank=2)", head=False)
    with AlphaBn(alpha=0.5).lifecycle(tuned) as adapted:
        torch.testing.assert_close(adapted(stream[0]).logits, base)
        tuned.step({**stream[0], "labels": torch.tensor([0, 1, 2, 0, 1])})
        for p in tuned.parameters():
            p.data += 0.1
        assert float((adapted(stream[0]).logits - base).abs().max()) > 1e-3


def test_its_settings():
    made = parse("alpha_bn")[0]
    assert (made.alpha, made.updates, made.step_rate, made.episodic) == (0.9, 0, 1e-3, False)


def test_what_cannot_act_is_refused():
    for settings, said in (({"alpha": -0.1}, "from 0 to 1"), ({"alpha": 1.1}, "from 0 to 1"),
                           ({"updates": -1}, "at least 0"),
                           ({"updates": 1, "step_rate": 0.0}, "positive"),
                           ({"step_rate": 0.1}, "does nothing without"),
                           ({"episodic": True}, "does nothing without"),
                           ({"targets": "features.1"}, "every batch norm"),
                           ({"updates": 1, "episodic": True}, "learnt nothing")):
        with pytest.raises(ConfigError, match=said):
            AlphaBn(**settings)
    with pytest.raises(ConfigError, match="this model has none; tent moves"):
        AlphaBn().lifecycle(tiny("vit")[0])
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.LayerNorm(6))
    with pytest.raises(ConfigError, match="there is none; updates=0"):
        AlphaBn(updates=1).lifecycle(bare)
    bare = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))   # no scale anywhere
    with AlphaBn().lifecycle(bare) as adapted:
        assert adapted(torch.randn(5, 4)).shape == (5, 2) and not adapted.params
    with AlphaBn().lifecycle(tiny("cnn")[0]) as adapted:
        assert not adapted.params
