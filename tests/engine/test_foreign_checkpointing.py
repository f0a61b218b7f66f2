"""Somebody else's gradient checkpointing around modules that burnish has touched. findings 1.4"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import burnish
from burnish.testing.models import tiny

RECIPES = ["lora(rank=2, dropout=0.2)", "full", "houlsby(width=4)", "prefix(length=2)",
           "mola(rank=2, dropout=0.2)", "snella(rank=2)", "nf4 + lora(rank=2)",
           "lora(rank=2) + checkpoint"]
MODELS = ["bert", "gpt2", "llama", "vit"]


def stir(tuned, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return tuned


def step(tuned, batch):
    torch.manual_seed(3)
    loss = tuned.loss(batch)
    loss.backward()
    got = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.model.zero_grad(set_to_none=True)
    return loss.detach(), got


def enable(net, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})


def agree(tuned, batch, reentrant):
    want_loss, want = step(tuned, batch)
    enable(tuned.model, reentrant)
    loss, got = step(tuned, batch)
    assert torch.equal(loss, want_loss)
    assert got.keys() == want.keys()
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-5, atol=1e-7,
                                   msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_without_it(recipe, model, reentrant):
    net, batch = tiny(model, dropout=0.3)
    net.train()
    if reentrant:                                     # stock needs an input that carries a gradient
        net.enable_input_require_grads() if hasattr(net, "enable_input_require_grads") else None
    agree(stir(burnish.tune(net, recipe)), batch, reentrant)
