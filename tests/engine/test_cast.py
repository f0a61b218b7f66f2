"""A model that is cast between two updates takes its optimizer's state along, or says why not. What
methods keep beside it: the conformance check `goes_on_after_a_cast`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.testing.models import tiny


@pytest.mark.parametrize("recipe", ["full", "full + adam8bit", "full + adamw + step_in_backward"])
def test_the_state_goes_where_the_model_is_cast_to(recipe):
    """A run goes on, in steps of the size it had."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    stays = copy.deepcopy({n: p.detach() for n, p in net.named_parameters()})
    net.to(torch.bfloat16)
    assert tuned.step(batch).isfinite()
    moved = {n: (p.detach().float() - stays[n]).abs().max() for n, p in tuned.named_parameters()}
    assert max(moved.values()) > 1e-3 and all(m < 0.1 for m in moved.values())


@pytest.mark.parametrize("recipe", ["full + lion", "full + adam8bit", "full + zo_fo"])
def test_state_of_our_own_in_fp32_is_not_taken_for_that_of_doubles(recipe):
    net, batch = tiny("bert")
    tuned = burnish.tune(net, recipe)
    tuned.step(batch)
    net.double()
    with pytest.raises(burnish.ConfigError, match="cast from float32 to float64"):
        tuned.step(batch)
    with pytest.raises(burnish.ConfigError, match="cast from float32 to float64"):
        tuned.step(batch)                                # and it is not forgotten
    net.float()
    assert tuned.step(batch).isfinite()
    net.double()
    tuned.optimizer(lr=1e-3)
    assert tuned.step(batch).isfinite()


def test_a_cast_model_steps_as_torch_s_adamw_does_whose_state_was_read_again():
    """torch casts moments where a state dict is read: the same numbers follow."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "full")
    opt = tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    params = [p for g in opt.param_groups for p in g["params"]]
    net.to(torch.bfloat16)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = torch.optim.AdamW(twins, lr=1e-2, **{k: opt.param_groups[0][k] for k in
                                                 ("betas", "eps", "weight_decay", "fused")})
    kept = copy.deepcopy(opt.state_dict())
    decay = [g["weight_decay"] for g in opt.param_groups for _ in g["params"]]
    kept["param_groups"] = [kept["param_groups"][0] | {"params": list(range(len(params)))}]
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    tuned.loss(batch).backward()
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
    other.load_state_dict(kept)
    opt.step()
    other.step()
    for p, twin, d in zip(params, twins, decay, strict=True):
        if d == decay[0]:
            assert torch.equal(p, twin)
