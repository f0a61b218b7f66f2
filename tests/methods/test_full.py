"""Full fine-tuning: the baseline everything is compared with."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.errors import RecipeError, TargetError
from burnish.testing.models import tiny


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_it_is_plain_training(name):
    """Losses and weights of three steps equal a loop of torch alone (tied weights included)."""
    model, batch = tiny(name)
    plain = copy.deepcopy(model)
    tuned = burnish.tune(model, "full")
    tuned.optimizer(lr=1e-3, weight_decay=0.1)
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for _ in range(3):
        loss = plain(**batch).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        torch.testing.assert_close(tuned.step(batch), loss.detach(), rtol=1e-6, atol=1e-6)
    for (n, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    assert sum(p.numel() for p in tuned.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("model", ["bert", "cnn", "llama", "timm_qkv"])
def test_gradients_are_stock_autograds(beside, model):                         # findings 6
    """Outputs and the gradient of every tensor of the body, in float64."""
    one = beside(model, "full", size=0.05)
    assert all(not rest for _, rest in one.theta)
    one.agree()


def test_everything_comes_back():
    model, batch = tiny("vit")
    base = copy.deepcopy(model)
    tuned = burnish.tune(model, "full")
    tuned.step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(),
                                                    strict=True))
    tuned.detach()
    for (n, a), b in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, n


def test_targets_narrow_it_to_some_weights():
    tuned = burnish.tune(tiny("vit")[0], "full(targets='q')", head=False)
    assert [n for n, _ in tuned.named_parameters()] == \
        [f"vit.layers.{i}.attention.q_proj.weight" for i in range(2)]


def test_a_run_of_rows_is_not_a_parameter():
    """A fused weight trains whole or through a delta, never silently whole when rows were asked."""
    with pytest.raises(TargetError, match="rows"):
        burnish.tune(tiny("timm_qkv")[0], "full(targets='q')", head=False)


def test_it_does_not_train_what_a_storage_holds():
    with pytest.raises(RecipeError, match="nf4 holds it frozen"):
        burnish.tune(tiny("llama", hidden_size=64)[0], "nf4 + full")


def test_a_delta_beside_trained_weights():
    """Both train: gradients of base and factors are those of the sum."""
    model, batch = tiny("mlp")
    tuned = burnish.tune(model, "full + lora(rank=4)", head=False)
    tuned.loss(batch).backward()
    assert all(p.grad is not None for p in tuned.parameters())
    assert model.layers[0].weight.grad.abs().sum() > 0


def test_what_others_have_added_and_whole_numbers_are_no_part_of_it():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    net.register_parameter("table", torch.nn.Parameter(torch.arange(3), requires_grad=False))
    tuned = burnish.tune(net, "lora(rank=2)", targets="0", head=False)
    tuned.add("all", "full")
    tuned.use("all")
    assert {n for n, _ in tuned.named_parameters()} == {"0.weight", "0.bias"}
