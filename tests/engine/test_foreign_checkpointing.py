"""Somebody else's gradient checkpointing around modules that burnish has touched. findings 1.4"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import burnish
from burnish.testing import stir
from burnish.testing.models import tiny

RECIPES = ["lora(rank=2, dropout=0.2)", "full", "houlsby(width=4)", "prefix(length=2)",
           "mola(rank=2, dropout=0.2)", "snella(rank=2)", "nf4 + lora(rank=2)",
           "lora(rank=2) + checkpoint", "lora(rank=2, dropout=0.2) + checkpoint(every=2)",
           "lora(rank=2, dropout=0.2) + checkpoint(mode='selective')"]
MODELS = ["bert", "gpt2", "llama", "vit"]


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


def case(recipe, model, reentrant):
    net, batch = tiny(model, dropout=0.3)
    net.train()
    if hasattr(net.config, "use_cache"):              # checkpointing turns it off: other roundings
        net.config.use_cache = False
    if reentrant and "lst" not in recipe:             # stock needs an input that carries a gradient
        net.enable_input_require_grads()
    agree(stir(burnish.tune(net, recipe)), batch, reentrant)


@pytest.mark.parametrize("recipe,model,reentrant", [
    *((r, "bert", False) for r in RECIPES), ("lora(rank=2, dropout=0.2)", "llama", True),
    ("prefix(length=2)", "vit", False), ("mola(rank=2, dropout=0.2)", "gpt2", True),
    ("lst(reduction=4)", "bert", False), ("lst(reduction=4)", "llama", True)])
def test_gradients_are_those_without_it(recipe, model, reentrant):
    case(recipe, model, reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", [*RECIPES, "lst(reduction=4)"])
def test_gradients_are_those_without_it_everywhere(recipe, model, reentrant):
    case(recipe, model, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_recomputes_in_the_call_of_its_forward(reentrant):
    """Two forwards with different padding, another adapter in between, one backward."""
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net, "mola(rank=2, dropout=0.0, balance=0.5)"))
    tuned.add("other", "lora(rank=2)")
    net.enable_input_require_grads()
    ids = batch["input_ids"]
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[0][:, 2:] = 0
    masks[1][0, 6:] = 0
    alone = []
    for mask in masks:
        alone.append(step(tuned, {"input_ids": ids, "attention_mask": mask, "labels": ids})[1])
    enable(net, reentrant)
    losses = [net(input_ids=ids, attention_mask=m, labels=ids).loss for m in masks]
    tuned.use("other")
    net(input_ids=ids.flip(0))
    tuned.use("default")
    with tuned.disabled():
        sum(losses).backward()
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.grad, alone[0][n] + alone[1][n], rtol=1e-4, atol=1e-6)


class Towers(nn.Module):
    """Blocks that their own model checkpoints, in eval mode too."""

    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
        self.reentrant, self.head = reentrant, nn.Linear(8, 3)

    def forward(self, x):
        for b in self.blocks:
            x = b(x) if self.reentrant is None else checkpoint(b, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_side_network_inside_it_is_refused_beforehand(reentrant):
    torch.manual_seed(0)
    net = Towers(reentrant)
    burnish.tune(net, "lst(reduction=2, init='random')")
    with pytest.raises(burnish.RecipeError, match="switch that checkpointing off"):
        net(torch.randn(2, 4, 8))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "snella(rank=2)", "parallel(reduced=4)"])
def test_attention_modules_and_taps_inside_it(recipe, reentrant):
    torch.manual_seed(0)
    net = Towers(None)
    twin = copy.deepcopy(net)
    twin.reentrant = reentrant
    x = torch.randn(2, 4, 8, requires_grad=True)
    results = []
    for m in (net, twin):
        tuned = stir(burnish.tune(m, recipe, head=True))
        results.append(torch.autograd.grad(m(x).square().sum(), x, retain_graph=True)
                       if not reentrant else ())
        m(x).square().sum().backward()
        results[-1] = [*results[-1], *(p.grad for p in tuned.parameters())]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
