"""Linear probe: the head and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.testing.models import tiny


@pytest.mark.parametrize("model", ["vit", "bert", "cnn", "llama"])
def test_exactly_the_head_trains(model):                                   # findings 6
    net, _ = tiny(model)
    tuned = burnish.tune(net, "linear_probe", head=False)
    head = {"vit": "classifier", "bert": "classifier", "cnn": "classifier", "llama": "lm_head"}
    names = {n for n, _ in tuned.named_parameters()}
    assert names == {n for n, _ in net.named_parameters() if n.startswith(head[model])}


def test_its_gradient_is_that_of_a_head_on_fixed_features():
    """Softmax regression on the untouched body's features."""
    net, batch = tiny("mlp", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "linear_probe")
    tuned.loss(batch).backward()
    with torch.no_grad():
        f = base.layers(batch["x"])
    W, b = (p.detach().clone().requires_grad_() for p in base.head.parameters())
    rows = torch.log_softmax(f @ W.t() + b, -1)
    (-rows[torch.arange(len(f)), batch["labels"]].mean()).backward()
    torch.testing.assert_close(net.head.weight.grad, W.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(net.head.bias.grad, b.grad, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for n, p in net.named_parameters() if not n.startswith("head"))


def test_a_head_may_decay():
    tuned = burnish.tune(tiny("vit")[0], "linear_probe")
    assert {g["weight_decay"] for g in tuned.optimizer(weight_decay=0.1).param_groups} == {0.1}


def test_a_model_without_a_head_is_refused():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x))

    with pytest.raises(RecipeError, match="no head was found"):
        burnish.tune(Body(), "linear_probe")


def test_the_body_is_fixed_while_the_head_trains():                        # findings 6
    """Neither moving statistics nor dropout: features are a fixed function."""
    net, batch = tiny("cnn")
    before = {n: b.clone() for n, b in net.named_buffers()}
    assert any("running_mean" in n for n in before)
    tuned = burnish.tune(net, "linear_probe")
    net.train()
    tuned.step(batch)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers() if n in before)
